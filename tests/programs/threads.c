/* Several threads stamp, verify, drop and resize memory of their own, and verify memory that all share.
 * Usage: threads MIB_PER_THREAD ROUNDS */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { THREADS = 4, PAGE = 4096 };
static size_t bytes;
static int rounds;
static uint64_t *shared;

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static void fail(const char *what, size_t page) {
    printf("wrong: %s, page %zu\n", what, page);
    exit(1);
}

static void stamp(uint64_t *words, size_t page, uint64_t seed) {
    for (int k = 0; k < 256; k++) words[k] = mix(seed + page * 512 + k);
    words[511] = seed ^ page;
}

static void check(uint64_t *words, size_t page, uint64_t seed, const char *what) {
    for (int k = 0; k < 256; k++) if (words[k] != mix(seed + page * 512 + k)) fail(what, page);
    if (words[511] != (seed ^ page)) fail(what, page);
}

static void *work(void *arg) {
    uint64_t id = (uint64_t)(uintptr_t)arg, seed = id << 40;
    size_t pages = bytes / PAGE;
    uint64_t *map = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) fail("mmap", 0);
    for (int round = 0; round < rounds; round++) {
        for (size_t p = 0; p < pages; p++) stamp(map + p * 512, p, seed + round);
        for (size_t p = 0; p < pages; p++) check(map + p * 512, p, seed + round, "own");
        for (size_t n = 0; n < pages; n++) {
            size_t p = mix(n + round + id) % pages;
            check(map + p * 512, p, seed + round, "own, at random");
            check(shared + p % (pages / 2) * 512, p % (pages / 2), 7, "shared");
        }
        /* Drop the second quarter: it reads as zeros, and the rest is as it was. */
        madvise(map + pages / 4 * 512, pages / 4 * PAGE, MADV_DONTNEED);
        for (size_t p = 0; p < pages; p++) {
            if (p >= pages / 4 && p < pages / 4 * 2) {
                for (int k = 0; k < 512; k++) if (map[p * 512 + k]) fail("dropped", p);
            } else {
                check(map + p * 512, p, seed + round, "beside dropped");
            }
        }
        /* Grow and shrink, perhaps elsewhere. */
        map = mremap(map, bytes, bytes * 3 / 2 / PAGE * PAGE, MREMAP_MAYMOVE);
        if (map == MAP_FAILED) fail("mremap", 0);
        for (size_t p = 0; p < pages / 4; p++) check(map + p * 512, p, seed + round, "moved");
        for (size_t p = pages; p < pages + pages / 4; p++) if (map[p * 512]) fail("grown", p);
        map = mremap(map, bytes * 3 / 2 / PAGE * PAGE, bytes, MREMAP_MAYMOVE);
        if (map == MAP_FAILED) fail("mremap back", 0);
        /* The heap, in pieces of all sizes. */
        enum { PIECES = 600 };
        static __thread unsigned char *piece[PIECES];
        static __thread size_t size[PIECES];
        for (int k = 0; k < PIECES; k++) {
            size[k] = mix(k + round * 1000 + id) % 40000 + 1;
            piece[k] = malloc(size[k]);
            memset(piece[k], (int)(k + id), size[k]);
        }
        for (int k = 0; k < PIECES; k++) {
            for (size_t b = 0; b < size[k]; b++) if (piece[k][b] != (unsigned char)(k + id)) fail("heap", k);
            if (k % 3 == 0) {
                piece[k] = realloc(piece[k], size[k] * 2);
                for (size_t b = 0; b < size[k]; b++) if (piece[k][b] != (unsigned char)(k + id)) fail("realloc", k);
            }
            free(piece[k]);
        }
    }
    munmap(map, bytes);
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    bytes = strtoul(argv[1], 0, 0) << 20;
    rounds = atoi(argv[2]);
    shared = malloc(bytes / 2 + PAGE);
    for (size_t p = 0; p < bytes / PAGE / 2; p++) stamp(shared + p * 512, p, 7);
    pthread_t thread[THREADS];
    for (uintptr_t k = 0; k < THREADS; k++) pthread_create(&thread[k], 0, work, (void *)k);
    for (int k = 0; k < THREADS; k++) pthread_join(thread[k], 0);
    printf("ok\n");
    return 0;
}
