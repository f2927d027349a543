/* Does one thing over and over at full speed: busy DIR WHAT [NUMBER]. Every round is a record `WHAT NUMBER` in
   DIR/log; a file DIR/stop ends it with `end WHAT COUNT`.

   spawn   posix_spawn of /bin/true (a child in vfork)
   slow    the same by hand, but the child waits for a file DIR/go before it calls exec
   chain   a vfork child that vforks /bin/true, waits, and ends without exec
   fork    fork of a child that ends at once
   thread  a thread that ends at once
   exec    execve of itself
   leap    execve of itself by a thread that is not the first, while others run */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char *dir, *what, *self;
static long number;
static int out;

static void fail(const char *where) {
    perror(where);
    exit(1);
}

static void say(const char *format, long n) {
    char line[64];
    int len = snprintf(line, sizeof line, format, what, n);
    if (write(out, line, len) != len)
        fail("write");
}

static void await(pid_t child) {
    int status;
    if (waitpid(child, &status, 0) != child || status != 0)
        fail("wait");
}

static void spawn(void) {
    static char *args[] = {"true", NULL};
    pid_t child;
    if (posix_spawn(&child, "/bin/true", NULL, NULL, args, NULL) != 0)
        fail("posix_spawn");
    await(child);
}

static void slow(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s/go", dir);
    pid_t child = vfork();
    if (child == 0) {
        while (access(path, F_OK) != 0)
            usleep(1000);
        execl("/bin/true", "true", NULL);
        _exit(1);
    }
    if (child < 0)
        fail("vfork");
    await(child);
}

static void chain(void) {
    pid_t child = vfork();
    if (child == 0) {
        int status;
        pid_t below = vfork();
        if (below == 0) {
            execl("/bin/true", "true", NULL);
            _exit(1);
        }
        if (below < 0 || waitpid(below, &status, 0) != below)
            _exit(2);
        _exit(status != 0);
    }
    if (child < 0)
        fail("vfork");
    await(child);
}

static void by_fork(void) {
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    if (child < 0)
        fail("fork");
    await(child);
}

static void *nothing(void *arg) { return arg; }

static void thread(void) {
    pthread_t threads[3];
    for (int i = 0; i < 3; i++)
        if (pthread_create(&threads[i], NULL, nothing, NULL) != 0)
            fail("pthread_create");
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
}

static void *exec(void *arg) {
    char text[32];
    snprintf(text, sizeof text, "%ld", number + 1);
    execl("/proc/self/exe", self, dir, what, text, NULL);
    fail("execl");
    return arg;
}

static void *spin(void *arg) {
    for (;;)
        (void)getppid();
    return arg;
}

static void leap(void) {
    pthread_t ignored;
    for (int i = 0; i < 5; i++)
        if (pthread_create(&ignored, NULL, spin, NULL) != 0)
            fail("pthread_create");
    if (pthread_create(&ignored, NULL, exec, NULL) != 0)
        fail("pthread_create");
    for (;;)
        pause();
}

int main(int argc, char **argv) {
    char path[4096];
    if (argc < 3)
        return 2;
    self = argv[0], dir = argv[1], what = argv[2];
    number = argc > 3 ? atol(argv[3]) : 0;
    snprintf(path, sizeof path, "%s/log", dir);
    out = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (out < 0)
        fail(path);
    snprintf(path, sizeof path, "%s/stop", dir);
    for (;; number++) {
        if (access(path, F_OK) == 0) {
            say("end %s %ld\n", number);
            return 0;
        }
        say("%s %ld\n", number);
        if (!strcmp(what, "spawn"))
            spawn();
        else if (!strcmp(what, "slow"))
            slow();
        else if (!strcmp(what, "chain"))
            chain();
        else if (!strcmp(what, "fork"))
            by_fork();
        else if (!strcmp(what, "thread"))
            thread();
        else if (!strcmp(what, "exec"))
            exec(NULL);
        else if (!strcmp(what, "leap"))
            leap();
        else
            return 2;
    }
}
