/* Children of fork, and their children, have every byte of their parent, while its threads go on changing theirs.
 * Usage: forks MIB ROUNDS */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };
static size_t pages;
static uint64_t *frozen, *moving;
static volatile int done;

static void verify(int depth) {
    for (size_t p = 0; p < pages; p++)
        if (frozen[p * 512] != p * 3 + 1 || frozen[p * 512 + 511] != ~p) _exit(10 + depth);
    /* Each page of the other half was written by one thread, word by word, front to back: a snapshot never shows a
     * later word that is newer than an earlier one. */
    for (size_t p = 0; p < pages; p++)
        if (moving[p * 512] < moving[p * 512 + 511]) _exit(20 + depth);
}

static void *move(void *arg) {
    for (uint64_t n = 1; !done; n++) {
        for (size_t p = 0; p < pages && !done; p++) {
            ((volatile uint64_t *)moving)[p * 512] = n;
            ((volatile uint64_t *)moving)[p * 512 + 511] = n;
        }
    }
    return arg;
}

static int child(int depth) {
    pid_t pid = fork();
    if (pid < 0) return 1;
    if (pid == 0) {
        verify(depth);
        for (size_t p = 0; p < pages; p += 7) frozen[p * 512 + 1] = p; /* its own copy */
        char *more = malloc(1 << 20);
        more[12345] = 1;
        free(more);
        _exit(depth > 0 ? child(depth - 1) : 0);
    }
    int status;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 99;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    pages = (strtoul(argv[1], 0, 0) << 20) / PAGE / 2;
    frozen = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    moving = calloc(pages, PAGE);
    for (size_t p = 0; p < pages; p++) {
        frozen[p * 512] = p * 3 + 1;
        frozen[p * 512 + 511] = ~p;
    }
    pthread_t thread;
    pthread_create(&thread, 0, move, 0);
    for (int round = 0; round < atoi(argv[2]); round++) {
        int status = child(2);
        if (status) {
            printf("wrong: a child ended with %d\n", status);
            return 1;
        }
        verify(0);
        for (size_t p = 0; p < pages; p++)
            if (frozen[p * 512 + 1]) {
                printf("wrong: a child's write is seen in its parent, page %zu\n", p);
                return 1;
            }
    }
    done = 1;
    pthread_join(thread, 0);
    printf("ok\n");
    return 0;
}
