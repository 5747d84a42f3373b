/* The edges of the calls that make and change mappings. Usage: mappings */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 256, BYTES = PAGES * PAGE };
#define CHECK(what) do { if (!(what)) { printf("wrong: %s, line %d\n", #what, __LINE__); return 1; } } while (0)

static sigjmp_buf back;
static void caught(int signal) { siglongjmp(back, signal); }

static char *fresh(void) {
    return mmap(0, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* Whether reading there gets this signal. */
static int dies_of(int wanted, char *at) {
    int got = sigsetjmp(back, 1);
    if (got == 0) return (void)*(volatile char *)at, 0;
    return got == wanted;
}

int main(void) {
    signal(SIGSEGV, caught);
    signal(SIGBUS, caught);
    char *map = fresh();
    CHECK(map != MAP_FAILED);
    memset(map, 1, BYTES);

    /* A page in the middle goes; its neighbours stay. */
    CHECK(munmap(map + 10 * PAGE, PAGE) == 0);
    CHECK(map[9 * PAGE] == 1 && map[11 * PAGE] == 1);
    int got = sigsetjmp(back, 1);
    if (got == 0) {
        volatile char c = map[10 * PAGE];
        (void)c;
        CHECK(!"an unmapped page was read");
    }
    CHECK(got == SIGSEGV || got == SIGBUS);

    /* Read-only pages refuse writes, and allow them again. */
    CHECK(mprotect(map + 20 * PAGE, 5 * PAGE, PROT_READ) == 0);
    got = sigsetjmp(back, 1);
    if (got == 0) {
        map[22 * PAGE] = 2;
        CHECK(!"a read-only page was written");
    }
    CHECK(got == SIGSEGV && map[22 * PAGE] == 1);
    CHECK(mprotect(map + 20 * PAGE, 5 * PAGE, PROT_READ | PROT_WRITE) == 0);
    map[22 * PAGE] = 2;
    CHECK(map[22 * PAGE] == 2);

    /* Dropped pages are zeros, whichever way they were dropped. */
    CHECK(madvise(map + 30 * PAGE, PAGE, MADV_DONTNEED) == 0);
    CHECK(map[30 * PAGE] == 0 && map[29 * PAGE] == 1);
    CHECK(madvise(map, BYTES / 2, MADV_WILLNEED) == 0 && map[0] == 1);

    /* A fixed mapping replaces what was there, and what is new is zeros. */
    char *fixed = mmap(map + 40 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(fixed == map + 40 * PAGE && fixed[0] == 0 && fixed[-1] == 1 && fixed[4 * PAGE] == 1);
    memset(fixed, 3, 4 * PAGE);
    CHECK(fixed[PAGE] == 3);

    /* A stray access fails, and leaves nothing behind for the next owner of the address. */
    int pipe_fds[2];
    CHECK(pipe(pipe_fds) == 0);
    char *stray = fresh();
    CHECK(munmap(stray, BYTES) == 0);
    CHECK(write(pipe_fds[1], stray + 2 * PAGE, 1) == -1 && errno == EFAULT);
    CHECK(fresh() != MAP_FAILED);
    stray[2 * PAGE] = 1;

    /* What another mapping was put over is the kernel's; its addresses come back only as fresh memory. */
    char *over = fresh();
    CHECK(mmap(over, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == over);
    memset(over, 7, BYTES);
    CHECK(over[BYTES - 1] == 7 && munmap(over, BYTES) == 0);
    for (int k = 0; k < 8; k++) {
        char *other = fresh();
        CHECK(other[0] == 0 && other[BYTES - 1] == 0);
    }

    /* Read-only pages that were evicted can still be read. */
    char *large = mmap(0, 64 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(large != MAP_FAILED);
    for (size_t p = 0; p < (64 << 20) / PAGE; p++) large[p * PAGE] = (char)p;
    CHECK(mprotect(large, 2 << 20, PROT_READ) == 0);
    for (size_t p = 0; p < (64 << 20) / PAGE; p += 3) CHECK(large[p * PAGE] == (char)p);
    for (size_t p = 0; p < (2 << 20) / PAGE; p++) CHECK(large[p * PAGE] == (char)p);
    CHECK(munmap(large, 64 << 20) == 0);

    /* A mapping that has a file's page in its middle goes as a whole, and its addresses can be used again. */
    for (int k = 0; k < 3; k++) {
        enum { LARGE = 4 * BYTES };
        char *over = mmap(0, LARGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(over != MAP_FAILED);
        memset(over, 7, LARGE);
        int file = open("/proc/self/exe", O_RDONLY);
        CHECK(mmap(over + 2 * PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 0) == over + 2 * PAGE);
        close(file);
        CHECK(over[0] == 7 && over[2 * PAGE + 1] == 'E' && over[3 * PAGE] == 7);
        CHECK(munmap(over, LARGE) == 0);
        char *elsewhere = mmap(over + LARGE / 2, LARGE / 4, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(elsewhere != MAP_FAILED);
        CHECK(munmap(elsewhere, LARGE / 4) == 0);
        for (int n = 0; n < 16; n++) memset(fresh(), n, BYTES);
    }

    /* Addresses that are reserved, and used by parts, as virtual machines do: in either way, and given up again. */
    enum { RESERVED = 256 << 20, PART = 32 << 20, KIND = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE };
    char *reserved = mmap(0, RESERVED, PROT_NONE, KIND, -1, 0);
    CHECK(reserved != MAP_FAILED);
    CHECK(munmap(reserved + RESERVED - PART, PART) == 0);
    CHECK(mprotect(reserved, PART, PROT_READ | PROT_WRITE) == 0);
    CHECK(mmap(reserved + PART, PART, PROT_READ | PROT_WRITE, KIND | MAP_FIXED, -1, 0) == reserved + PART);
    for (size_t p = 0; p < 2 * PART; p += PAGE) *(size_t *)(reserved + p) = p ^ 0x5a5a;
    for (size_t p = 0; p < 2 * PART; p += PAGE) CHECK(*(size_t *)(reserved + p) == (p ^ 0x5a5a));
    CHECK(dies_of(SIGSEGV, reserved + 2 * PART));
    CHECK(mmap(reserved, PART, PROT_NONE, KIND | MAP_FIXED, -1, 0) == reserved);
    CHECK(dies_of(SIGSEGV, reserved));
    CHECK(mprotect(reserved, PART, PROT_READ | PROT_WRITE) == 0);
    for (size_t p = 0; p < PART; p += PAGE) CHECK(*(size_t *)(reserved + p) == 0);
    for (size_t p = PART; p < 2 * PART; p += PAGE) CHECK(*(size_t *)(reserved + p) == (p ^ 0x5a5a));
    if (getenv("PGMAP_RUN")) {
        static unsigned char there[2 * PART / PAGE];
        size_t count = 0;
        CHECK(mincore(reserved, 2 * PART, there) == 0);
        for (size_t p = 0; p < sizeof there; p++) count += there[p] & 1;
        CHECK(count < sizeof there / 4);
    }

    /* A protection key forbids what it forbids, and the bytes stay. */
    int key = pkey_alloc(0, 0);
    if (key >= 0) {
        CHECK(pkey_mprotect(reserved + PART, 1 << 20, PROT_READ | PROT_WRITE, key) == 0);
        for (size_t p = PART; p < 2 * PART; p += PAGE) CHECK(*(size_t *)(reserved + p) == (p ^ 0x5a5a));
        CHECK(pkey_set(key, PKEY_DISABLE_ACCESS) == 0);
        CHECK(dies_of(SIGSEGV, reserved + PART));
        /* Another protection keeps the key; and neither is left behind where memory is given back. */
        CHECK(mprotect(reserved + PART, 1 << 20, PROT_READ) == 0);
        for (size_t p = PART + (1 << 20); p < 2 * PART; p += PAGE) CHECK(*(size_t *)(reserved + p) == (p ^ 0x5a5a));
        CHECK(dies_of(SIGSEGV, reserved + PART));
        char *keyed = mmap(0, PART, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(pkey_set(key, 0) == 0 && pkey_mprotect(keyed, PART, PROT_READ | PROT_WRITE, key) == 0);
        CHECK(munmap(keyed, PART) == 0 && pkey_set(key, PKEY_DISABLE_ACCESS) == 0);
        char *again = mmap(0, PART, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(again, 3, PART);
        CHECK(munmap(again, PART) == 0);
        CHECK(pkey_set(key, 0) == 0);
        CHECK(pkey_mprotect(reserved + PART, 1 << 20, PROT_READ | PROT_WRITE, 0) == 0);
        CHECK(pkey_free(key) == 0);
        for (size_t p = PART; p < 2 * PART; p += PAGE) CHECK(*(size_t *)(reserved + p) == (p ^ 0x5a5a));
    }
    CHECK(munmap(reserved, RESERVED - PART) == 0);

    /* Freed addresses come back as zeros. */
    for (int k = 0; k < 50; k++) {
        char *other = fresh();
        for (int p = 0; p < PAGES; p++) {
            CHECK(other[p * PAGE] == 0 && other[p * PAGE + PAGE - 1] == 0);
            other[p * PAGE] = 9;
        }
        CHECK(munmap(other, BYTES) == 0);
    }

    /* Impossible wishes fail as they should. */
    errno = 0;
    CHECK(mmap(0, (size_t)1 << 46, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
    CHECK(errno == ENOMEM);
    CHECK(malloc((size_t)1 << 60) == 0 && errno == ENOMEM);
    void *aligned = 0;
    CHECK(posix_memalign(&aligned, 1 << 16, 100000) == 0 && ((size_t)aligned & 0xffff) == 0);
    CHECK(malloc_usable_size(aligned) >= 100000);
    free(aligned);
    CHECK(posix_memalign(&aligned, 3, 100) == EINVAL);

    /* Our descriptors survive a program that closes everything. */
    for (int fd = 3; fd < 4096; fd++) close(fd);
    close_range(3, ~0u, 0);
    memset(map + 100 * PAGE, 4, 50 * PAGE);
    CHECK(map[149 * PAGE] == 4 && map[99 * PAGE] == 1);
    printf("ok\n");
    return 0;
}
