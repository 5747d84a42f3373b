/* The program of `cargo xtask bench files`: reads one word of ACCESSES random pages of FILE through a mapping, or of
 * as many as it can in three seconds; before that it does the same for a second and a half, so that budgets are kept
 * from then on. With a third argument it tells the kernel that its accesses are random.
 *
 * Page n of the file begins with the word n, which every access checks. Prints microseconds per access.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

enum { PAGE_BYTES = 4096, PAGE_WORDS = 512, SETTLE_US = 1500000, MOST_US = 3000000 };

static uint64_t scramble(uint64_t word)
{
	word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
	word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
	return word ^ (word >> 31);
}

static double now_us(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

static void check(volatile uint64_t *words, uint64_t page)
{
	if (words[page * PAGE_WORDS] != page) {
		fprintf(stderr, "page %llu does not hold what it should\n", (unsigned long long)page);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	if (argc < 3) {
		fprintf(stderr, "usage: bench_file FILE ACCESSES [random]\n");
		return 2;
	}
	/* To be written, too: `pgmap run` keeps those files within its budget. */
	int fd = open(argv[1], O_RDWR);
	struct stat stat;
	if (fd < 0 || fstat(fd, &stat)) {
		perror(argv[1]);
		return 1;
	}
	uint64_t pages = stat.st_size / PAGE_BYTES, accesses = strtoull(argv[2], NULL, 10);
	volatile uint64_t *words = mmap(NULL, stat.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (words == MAP_FAILED || !pages || !accesses) {
		perror("mmap");
		return 1;
	}
	if (argc > 3 && madvise((void *)words, stat.st_size, MADV_RANDOM)) {
		perror("madvise");
		return 1;
	}
	uint64_t nth = 0;
	double start = now_us();
	while (now_us() < start + SETTLE_US)
		check(words, scramble(++nth) % pages);
	uint64_t before = nth;
	start = now_us();
	while (nth - before < accesses && now_us() < start + MOST_US)
		check(words, scramble(++nth) % pages);
	printf("%.4f\n", (now_us() - start) / (nth - before));
	return 0;
}
