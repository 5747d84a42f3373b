/* Reads and writes of files into memory that is not there: read, write, pread with O_DIRECT, by several threads,
 * while another thread keeps the memory moving. Usage: files MIB DIRECTORY */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, CHUNK = 64 * PAGE, READERS = 2 };
static size_t bytes;
static const char *directory;
static volatile int done;

static void fail(const char *what, size_t at) {
    printf("wrong: %s at %zu: %s\n", what, at, strerror(errno));
    exit(1);
}

static unsigned char expected(size_t at) { return (unsigned char)((at * 2654435761u) >> 24); }

static void *churn(void *arg) {
    unsigned char *map = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (unsigned n = 0; !done; n++) {
        size_t at = (size_t)n * 2654435761u % (bytes / PAGE) * PAGE;
        map[at]++;
    }
    munmap(map, bytes);
    return arg;
}

static void *reader(void *arg) {
    int direct = (int)(uintptr_t)arg;
    char path[4096];
    snprintf(path, sizeof path, "%s/pgmap-test-%d-%d", directory, getpid(), direct);
    unsigned char *source = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *target = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t k = 0; k < bytes; k++) source[k] = expected(k + direct);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | (direct ? O_DIRECT : 0), 0600);
    if (fd < 0 && direct) fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0) fail("open", 0);
    unlink(path);
    for (int round = 0; round < 3; round++) {
        /* Written from pages that have been evicted. */
        for (size_t at = 0; at < bytes; at += CHUNK)
            if (pwrite(fd, source + at, CHUNK, at) != CHUNK) fail("write", at);
        /* Read into pages that have never been touched, or have been evicted. */
        for (size_t at = 0; at < bytes; at += CHUNK)
            if (pread(fd, target + at, CHUNK, at) != CHUNK) fail("read", at);
        for (size_t k = 0; k < bytes; k++) if (target[k] != expected(k + direct)) fail("bytes", k);
        madvise(target, bytes / 2, MADV_DONTNEED);
    }
    close(fd);
    munmap(source, bytes);
    munmap(target, bytes);
    return 0;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    bytes = strtoul(argv[1], 0, 0) << 20;
    directory = argv[2];
    pthread_t churner, thread[READERS];
    pthread_create(&churner, 0, churn, 0);
    for (uintptr_t k = 0; k < READERS; k++) pthread_create(&thread[k], 0, reader, (void *)k);
    for (int k = 0; k < READERS; k++) pthread_join(thread[k], 0);
    done = 1;
    pthread_join(churner, 0);
    printf("ok\n");
    return 0;
}
