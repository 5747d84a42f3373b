/* More pages than RAM that may not be written: they keep their bytes, and refuse what they must while they leave and come
   back. Usage: readonly MEGABYTES ROUNDS */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, KINDS = 4 };
static const int kinds[KINDS] = {
    PROT_READ, PROT_READ | PROT_EXEC, PROT_READ | PROT_WRITE | PROT_EXEC, PROT_NONE,
};

static unsigned char *map;
static size_t pages;
static _Thread_local sigjmp_buf back;
static void caught(int signal) { siglongjmp(back, signal); }

/* Runs of pages have a kind of protection each, and lengths that are no multiples of anything. */
static int kind(size_t page) { return kinds[(page / 113) % KINDS]; }

static unsigned char byte(size_t page, size_t at) { return (unsigned char)(page * 31 + at * 7 + (page >> 8)); }

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state;
}

static int traps(volatile unsigned char *at, int store) {
    int got = sigsetjmp(back, 1);
    if (got == 0) {
        if (store) *at = 0xee;
        else (void)*at;
        return 0;
    }
    return got == SIGSEGV;
}

static int check(size_t page, uint64_t random) {
    unsigned char *start = map + page * PAGE;
    if (!(kind(page) & PROT_WRITE) && random % 4 == 0 && !traps(start + random % PAGE, 1)) return printf("page %zu was written\n", page), 1;
    if (kind(page) == PROT_NONE) {
        if (!traps(start + random % PAGE, 0)) return printf("page %zu was read\n", page), 1;
        return 0;
    }
#ifdef __x86_64__
    /* The code of the page answers its number: mov eax, number; ret. */
    if (kind(page) & PROT_EXEC && ((uint32_t (*)(void))(start + PAGE - 16))() != (uint32_t)page)
        return printf("page %zu runs wrongly\n", page), 1;
#endif
    for (size_t at = 0; at < PAGE - 16; at += 61)
        if (start[at] != byte(page, at)) return printf("page %zu, byte %zu is wrong\n", page, at), 1;
    return 0;
}

/* As a garbage collector does: pages are writable only while they are written. */
enum { OWN = 1024, RUN = 5 };
static int flip(unsigned char *own, unsigned *generations, uint64_t random) {
    size_t first = random % (OWN - RUN);
    if (mprotect(own + first * PAGE, RUN * PAGE, PROT_READ | PROT_WRITE)) return perror("mprotect"), 1;
    for (size_t page = first; page < first + RUN; page++) {
        unsigned *words = (unsigned *)(own + page * PAGE);
        for (int at = 0; at < PAGE / 4; at += 61) {
            if (words[at] != generations[page]) return printf("own page %zu is of another generation\n", page), 1;
            words[at]++;
        }
        generations[page]++;
    }
    if (mprotect(own + first * PAGE, RUN * PAGE, PROT_READ)) return perror("mprotect"), 1;
    return !traps(own + first * PAGE, 1) && printf("own page %zu was written\n", first);
}

static void *checker(void *argument) {
    uint64_t random = (uintptr_t)argument;
    unsigned generations[OWN] = {0};
    unsigned char *own = mmap(0, OWN * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (own == MAP_FAILED) return perror("mmap"), (void *)1;
    for (size_t n = 0; n < pages; n++) {
        uint64_t r = next(&random);
        if (check(r % pages, r >> 32)) return (void *)1;
        if (n % 4 == 0 && flip(own, generations, r >> 20)) return (void *)1;
    }
    munmap(own, OWN * PAGE);
    return 0;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    pages = (size_t)atoi(arguments[1]) * 256;
    signal(SIGSEGV, caught);
    map = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return perror("mmap"), 1;
    for (size_t page = 0; page < pages; page++) {
        unsigned char *start = map + page * PAGE, code[] = {0xb8, 0, 0, 0, 0, 0xc3};
        for (size_t at = 0; at < PAGE; at++) start[at] = byte(page, at);
        uint32_t number = (uint32_t)page;
        memcpy(code + 1, &number, 4);
        memcpy(start + PAGE - 16, code, sizeof code);
        if (mprotect(start, PAGE, kind(page))) return perror("mprotect"), 1;
    }
    for (int round = 0; round < atoi(arguments[2]); round++) {
        pthread_t threads[2];
        for (long n = 0; n < 2; n++) pthread_create(&threads[n], 0, checker, (void *)(n * 977 + round * 13 + 1));
        for (int n = 0; n < 2; n++) {
            void *wrong;
            pthread_join(threads[n], &wrong);
            if (wrong) return 1;
        }
    }
    /* A child is bound by the same protections. */
    pid_t child = fork();
    if (child == 0) {
        for (size_t page = 0; page < pages; page += 7)
            if (check(page, page * 12345)) _exit(1);
        _exit(0);
    }
    int status;
    if (waitpid(child, &status, 0) != child || status != 0) return printf("the child's status is %d\n", status), 1;
    /* What was forbidden had its bytes all the same. */
    if (mprotect(map, pages * PAGE, PROT_READ)) return perror("mprotect"), 1;
    for (size_t page = 0; page < pages; page++)
        for (size_t at = 0; at < PAGE - 16; at += 61)
            if (map[page * PAGE + at] != byte(page, at)) return printf("page %zu, byte %zu is wrong\n", page, at), 1;
    printf("ok\n");
    return 0;
}
