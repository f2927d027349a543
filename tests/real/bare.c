/* Without a C library: its own start, its own system calls. */
typedef unsigned long word;

static long call(long number, word a, word b, word c, word d) {
    long result;
    register word r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return result;
}

static word length(const char *text) {
    word n = 0;
    while (text[n])
        n++;
    return n;
}

static char *copy(char *to, const char *from) {
    while (*from)
        *to++ = *from++;
    return to;
}

static void record(long log, const char *name, word number) {
    char line[64], digits[24], *end = line;
    int n = 0;
    end = copy(end, name);
    do {
        digits[n++] = '0' + number % 10;
        number /= 10;
    } while (number);
    while (n)
        *end++ = digits[--n];
    *end++ = '\n';
    if (call(1, log, (word)line, end - line, 0) != end - line)
        call(231, 3, 0, 0, 0);
}

static word numbers[100000];

__attribute__((used)) void run(word *stack) {
    char log[4096], stop[4096];
    char *folder = (char *)stack[2];
    long pause[2] = {0, 2000000};
    word number = 0;
    if (length(folder) > 4000)
        call(231, 2, 0, 0, 0);
    *copy(copy(log, folder), "/log") = 0;
    *copy(copy(stop, folder), "/stop") = 0;
    long file = call(2, (word)log, 01102 /* O_RDWR | O_CREAT | O_TRUNC */, 0666, 0);
    while (call(21, (word)stop, 0, 0, 0) != 0) {
        if (number && numbers[(number - 1) % 100000] != (number - 1) * 3)
            call(231, 4, 0, 0, 0);
        numbers[number % 100000] = number * 3;
        record(file, "number ", number++);
        call(35, (word)pause, 0, 0, 0);
    }
    record(file, "end number ", number);
    call(231, 0, 0, 0, 0);
}

__asm__(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call run\n");
