/* A parent that only reads while its forked children live: every page in RAM is shared with them, and clean.
 * Usage: fork_reads MIB FORKS */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WORDS = 512 };

static void check(const uint64_t *words, size_t pages, size_t step) {
    for (size_t n = 0, p = 0; n < pages; n++, p = (p + step) % pages)
        if (words[p * WORDS] != (p ^ 0x5555) || words[p * WORDS + 511] != p) {
            printf("wrong: page %zu\n", p);
            exit(1);
        }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    size_t bytes = strtoul(argv[1], 0, 0) << 20, pages = bytes / 4096;
    uint64_t *words = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t p = 0; p < pages; p++) { words[p * WORDS] = p ^ 0x5555; words[p * WORDS + 511] = p; }
    for (int k = 0; k < atoi(argv[2]); k++) {
        check(words, pages, 1);
        pid_t child = fork();
        if (child == 0) { pause(); _exit(1); }
        check(words, pages, 1);
        check(words, pages, 4099);
        kill(child, SIGKILL);
        waitpid(child, 0, 0);
        check(words, pages, 1);
    }
    printf("ok\n");
    return 0;
}
