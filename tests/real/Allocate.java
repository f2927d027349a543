import java.io.FileWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayDeque;

/** Allocates and throws away, so that the collector runs, and checks what it keeps; a second thread counts. */
public class Allocate {
    public static void main(String[] args) throws Exception {
        Path stop = Path.of(args[0], "stop");
        try (FileWriter log = new FileWriter(args[0] + "/log")) {
            Thread second = new Thread(() -> count(log, stop));
            second.start();
            ArrayDeque<int[]> kept = new ArrayDeque<>();
            int number = 0;
            for (; !Files.exists(stop); number++) {
                int[] block = new int[50_000];
                java.util.Arrays.fill(block, number);
                kept.add(block);
                if (kept.size() > 100) {
                    int[] old = kept.remove();
                    for (int value : old) {
                        if (value != number - 100) throw new IllegalStateException(value + " in block " + (number - 100));
                    }
                }
                record(log, "block " + number);
                Thread.sleep(2);
            }
            second.join();
            record(log, "end block " + number);
        }
    }

    static void count(FileWriter log, Path stop) {
        try {
            int number = 0;
            for (; !Files.exists(stop); number++) {
                record(log, "tick " + number);
                Thread.sleep(5);
            }
            record(log, "end tick " + number);
        } catch (Exception e) {
            e.printStackTrace();
            System.exit(1);
        }
    }

    static void record(FileWriter log, String line) throws java.io.IOException {
        synchronized (log) {
            log.write(line + "\n");
            log.flush();
        }
    }
}
