/* A thread forks again and again while others map, touch and unmap memory: nobody waits for ever.
 * Usage: fork_storm FORKS */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BYTES = 160 << 10, MAPS = 64 };

static void *churn(void *arg) {
    char *map[MAPS];
    for (;;) {
        for (int k = 0; k < MAPS; k++) {
            map[k] = mmap(0, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            map[k][0] = 1;
        }
        for (int k = 0; k < MAPS; k++) munmap(map[k], BYTES);
    }
    return arg;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    pthread_t thread;
    for (int k = 0; k < 3; k++) pthread_create(&thread, 0, churn, 0);
    for (int k = 0; k < atoi(argv[1]); k++) {
        pid_t pid = fork();
        if (pid == 0) _exit(0);
        waitpid(pid, 0, 0);
    }
    printf("ok\n");
    fflush(stdout);
    _exit(0);
}
