/* A private mapping of a file larger than the budget, used in every way that a program has: every byte is looked at, again and again.
 * Says on standard error how many of its pages were in RAM at most when all had been read, and when a third had been changed.
 * Usage: private_file [announced], in a directory of its own; `announced` if forks have to be, as those by raw system calls are not */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, PAGES = 24 << 10, THREADS = 4 };
#define CHECK(what) do { if (!(what)) { printf("wrong: %s, line %d, %m\n", #what, __LINE__); exit(1); } } while (0)

static sigjmp_buf back;
static void caught(int signal) { siglongjmp(back, signal); }

/* Which signal a read there gets; 0 for none. */
static int dies_of(char *at) {
    int got = sigsetjmp(back, 1);
    if (got == 0) (void)*(volatile char *)at;
    return got;
}

static uint64_t word(uint64_t page, uint64_t nth) {
    return (page + 1) * 0x9E3779B97F4A7C15 + (nth + 1) * 0xC2B2AE3D27D4EB4F;
}

static uint64_t *at(char *map, size_t page) { return (uint64_t *)(map + page * PAGE); }

/* What has been written to the last words of each page; 0 for nothing. */
static uint64_t marks[PAGES];
enum { MARK = WORDS - 8 };

static void mark(char *map, size_t page, uint64_t value) {
    at(map, page)[MARK] = marks[page] = value;
}

static void verify_page(char *map, size_t page) {
    uint64_t *words = at(map, page);
    for (size_t nth = 0; nth < MARK; nth++) CHECK(words[nth] == word(page, nth));
    CHECK(words[MARK] == (marks[page] ? marks[page] : word(page, MARK)));
}

static void verify(char *map, size_t from, size_t to) {
    for (size_t page = from; page < to; page++) verify_page(map, page);
}

static size_t resident(char *map) {
    static unsigned char in_ram[PAGES];
    size_t count = 0;
    CHECK(mincore(map, (size_t)PAGES * PAGE, in_ram) == 0);
    for (size_t page = 0; page < PAGES; page++) count += in_ram[page] & 1;
    return count;
}

static void make_file(void) {
    FILE *file = fopen("data", "w");
    CHECK(file);
    for (size_t page = 0; page < PAGES; page++) {
        uint64_t words[WORDS];
        for (size_t nth = 0; nth < WORDS; nth++) words[nth] = word(page, nth);
        CHECK(fwrite(words, PAGE, 1, file) == 1);
    }
    CHECK(fclose(file) == 0);
}

static char *map_file(size_t pages, size_t from) {
    int fd = open("data", O_RDONLY);
    CHECK(fd >= 0);
    char *map = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, from * PAGE);
    CHECK(map != MAP_FAILED && close(fd) == 0);
    return map;
}

/* The child has what its parent has, and changes its own. */
static void forks(char *map, int ways) {
    for (int raw = 0; raw < ways; raw++) {
        pid_t child = raw ? syscall(SYS_fork) : fork();
        if (child == 0) {
            for (size_t page = 0; page < PAGES; page += 5) mark(map, page, page ^ 0xC0FFEE);
            verify(map, 0, PAGES);
            /* What it gives up is the file's again, or it may not. */
            if (madvise(map + 600 * PAGE, 50 * PAGE, MADV_DONTNEED) == 0) memset(marks + 600, 0, 50 * sizeof *marks);
            verify(map, 590, 660);
            _exit(0);
        }
        /* These are not what the child gets. */
        for (size_t page = 1; page < PAGES; page += 7) mark(map, page, page * 3 + raw + 1);
        int status;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
    verify(map, 0, PAGES);
}

/* What was changed and is not wanted is the file's again. */
static void discards(char *map) {
    CHECK(madvise(map + 1000 * PAGE, 4000 * PAGE, MADV_FREE) == -1 && errno == EINVAL);
    verify(map, 900, 5100);
    CHECK(madvise(map + 1000 * PAGE, 4000 * PAGE, MADV_DONTNEED) == 0);
    memset(marks + 1000, 0, 4000 * sizeof *marks);
    verify(map, 900, 5100);
    mark(map, 2000, 7);
    CHECK(syscall(SYS_madvise, map + 2000 * PAGE, PAGE, MADV_DONTNEED) == 0);
    marks[2000] = 0;
    verify(map, 1999, 2002);
}

/* The kernel stores to the mapping, and loads from it. */
static void system_calls(char *map) {
    int pipes[2];
    CHECK(pipe(pipes) == 0);
    for (size_t page = 0; page < PAGES; page += 97) {
        uint64_t value = page + 12345;
        CHECK(write(pipes[1], &value, 8) == 8 && read(pipes[0], &at(map, page)[MARK], 8) == 8);
        marks[page] = value;
        CHECK(write(pipes[1], at(map, page), 64) == 64);
        uint64_t words[8];
        CHECK(read(pipes[0], words, 64) == 64 && words[7] == word(page, 7));
    }
    close(pipes[0]);
    close(pipes[1]);
    verify(map, 0, PAGES);
}

static char *shared;
static void *add(void *nth) {
    uint64_t seed = (uintptr_t)nth * 77 + 5, *own = (uint64_t *)calloc(PAGES, 8);
    for (int round = 0; round < 20000; round++) {
        seed = seed * 6364136223846793005 + 1442695040888963407;
        size_t page = (seed >> 33) % PAGES;
        uint64_t *words = at(shared, page) + MARK + 1 + (uintptr_t)nth;
        CHECK(*words == (own[page] ? own[page] : word(page, MARK + 1 + (uintptr_t)nth)));
        *words = own[page] = seed | 1;
        CHECK(at(shared, (page * 31) % PAGES)[3] == word((page * 31) % PAGES, 3));
    }
    for (size_t page = 0; page < PAGES; page++) {
        size_t place = MARK + 1 + (uintptr_t)nth;
        CHECK(at(shared, page)[place] == (own[page] ? own[page] : word(page, place)));
    }
    free(own);
    return 0;
}

static void threads(char *map) {
    pthread_t all[THREADS];
    shared = map;
    for (uintptr_t nth = 0; nth < THREADS; nth++) CHECK(pthread_create(&all[nth], 0, add, (void *)nth) == 0);
    for (int nth = 0; nth < THREADS; nth++) CHECK(pthread_join(all[nth], 0) == 0);
    verify(map, 0, PAGES);
}

/* Parts are protected, replaced and given up; the rest stays what it is. */
static void parts(char *map) {
    CHECK(mprotect(map + 100 * PAGE, 100 * PAGE, PROT_READ) == 0);
    int got = sigsetjmp(back, 1);
    if (got == 0) map[150 * PAGE] = 1;
    CHECK(got == SIGSEGV);
    verify(map, 90, 210);
    CHECK(mprotect(map + 100 * PAGE, 100 * PAGE, PROT_READ | PROT_WRITE) == 0);
    mark(map, 150, 4711);
    CHECK(munmap(map + 300 * PAGE, 100 * PAGE) == 0);
    CHECK(dies_of(map + 300 * PAGE) && dies_of(map + 399 * PAGE));
    char *zeros = mmap(map + 500 * PAGE, 100 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(zeros == map + 500 * PAGE);
    for (size_t nth = 0; nth < 100 * WORDS; nth++) CHECK(at(zeros, 0)[nth] == 0);
    CHECK(madvise(zeros, 100 * PAGE, MADV_DONTNEED) == 0 && zeros[PAGE] == 0);
    verify(map, 0, 300);
    verify(map, 400, 500);
    verify(map, 600, PAGES);
    /* Longer it may become, or not. */
    size_t most = (PAGES - 600) * PAGE;
    char *longer = mremap(map + 600 * PAGE, most, most + PAGE, MREMAP_MAYMOVE);
    CHECK(longer != MAP_FAILED || errno == ENOMEM);
    char *rest = longer == MAP_FAILED ? map + 600 * PAGE : longer;
    CHECK(mremap(rest, most, most / 2 / PAGE * PAGE, 0) == rest);
    verify(rest - 600 * PAGE, 600, 600 + most / 2 / PAGE);
    CHECK(munmap(rest, most / 2 / PAGE * PAGE) == 0 && munmap(map, 300 * PAGE) == 0);
    CHECK(munmap(map + 400 * PAGE, 200 * PAGE) == 0);
    memset(marks, 0, sizeof marks);
}

/* The file ends in the middle of a page. */
static void ends(void) {
    size_t from = 1000, there = PAGES - from;
    CHECK(truncate("data", (off_t)PAGES * PAGE - 100) == 0);
    char *map = map_file(there + 10, from);
    CHECK(map[there * PAGE - 101] && !map[there * PAGE - 100] && !map[there * PAGE - 1]);
    CHECK(at(map, 17)[5] == word(from + 17, 5));
    CHECK(dies_of(map + there * PAGE) == SIGBUS && dies_of(map + (there + 9) * PAGE) == SIGBUS);
    pid_t child = fork();
    if (child == 0) {
        CHECK(dies_of(map + there * PAGE) == SIGBUS && dies_of(map + (there + 5) * PAGE) == SIGBUS);
        CHECK(at(map, 18)[5] == word(from + 18, 5));
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(truncate("data", (off_t)(PAGES + 10) * PAGE) == 0);
    CHECK(madvise(map, (there + 10) * PAGE, MADV_DONTNEED) == 0);
    CHECK(map[there * PAGE] == 0 && map[(there + 9) * PAGE] == 0);
    CHECK(munmap(map, (there + 10) * PAGE) == 0);
}

/* Nothing that is done with mappings ends a lock on the file. */
static void locks(void) {
    char *map = map_file(PAGES, 0);
    int fd = open("data", O_RDWR);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    CHECK(fd >= 0 && fcntl(fd, F_SETLK, &lock) == 0);
    verify_page(map, 77);
    CHECK(munmap(map, (size_t)PAGES * PAGE) == 0);
    pid_t child = fork();
    if (child == 0) _exit(fcntl(fd, F_SETLK, &lock) == -1 && (errno == EAGAIN || errno == EACCES) ? 0 : 1);
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    close(fd);
}

int main(int argc, char **argv) {
    (void)argv;
    signal(SIGSEGV, caught);
    signal(SIGBUS, caught);
    make_file();
    char *map = map_file(PAGES, 0);
    verify(map, 0, PAGES);
    size_t read = resident(map);
    for (size_t page = 0; page < PAGES; page += 3) mark(map, page, page + 1);
    fprintf(stderr, "%zu %zu\n", read, resident(map));
    verify(map, 0, PAGES);
    int fd = open("data", O_RDONLY);
    uint64_t there;
    for (size_t page = 0; page < PAGES; page += 3)
        CHECK(pread(fd, &there, 8, (off_t)page * PAGE + MARK * 8) == 8 && there == word(page, MARK));
    close(fd);
    forks(map, argc > 1 ? 1 : 2);
    discards(map);
    system_calls(map);
    threads(map);
    memset(marks, 0, sizeof marks);
    CHECK(madvise(map, (size_t)PAGES * PAGE, MADV_DONTNEED) == 0);
    parts(map);
    ends();
    locks();
    printf("every byte was right\n");
}
