"""A pool of three processes squares numbers; results come in order."""
import multiprocessing, os, sys, time

folder = sys.argv[1]


def square(number):
    time.sleep(0.002)
    return number, number * number


def numbers():
    number = 0
    while not os.path.exists(folder + "/stop"):
        yield number
        number += 1
        time.sleep(0.002)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    with multiprocessing.Pool(3) as pool, open(folder + "/log", "w", buffering=1) as log:
        count = 0
        for number, result in pool.imap(square, numbers()):
            assert result == number * number
            log.write(f"square {number}\n")
            count += 1
        log.write(f"end square {count}\n")
        pool.close()
        pool.join()
