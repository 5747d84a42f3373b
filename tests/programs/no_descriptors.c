/* A program that has used up its descriptors forks, and its child has every byte. Usage: no_descriptors MIB */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned char *bytes;
static size_t count;

static int are_right(void) {
    for (size_t k = 0; k < count; k++) if (bytes[k] != (unsigned char)(k >> 9)) return 0;
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    count = strtoul(argv[1], 0, 0) << 20;
    bytes = malloc(count);
    for (size_t k = 0; k < count; k++) bytes[k] = k >> 9;
    struct rlimit few, found;
    getrlimit(RLIMIT_NOFILE, &few);
    few.rlim_cur = 64;
    if (setrlimit(RLIMIT_NOFILE, &few)) return 3;
    while (open("/dev/null", O_RDONLY) >= 0) {}
    for (int k = 0; k < 3; k++) {
        pid_t child = fork();
        if (child == 0) {
            pid_t grandchild = fork();
            if (grandchild == 0) _exit(!are_right());
            int status = 1;
            waitpid(grandchild, &status, 0);
            _exit(status || !are_right());
        }
        int status = 1;
        waitpid(child, &status, 0);
        if (status || !are_right()) { printf("wrong: fork %d\n", k); return 1; }
    }
    getrlimit(RLIMIT_NOFILE, &found);
    if (found.rlim_cur != 64 || found.rlim_max != few.rlim_max) { printf("wrong: the limit is another\n"); return 1; }
    printf("ok\n");
    return 0;
}
