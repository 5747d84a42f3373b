/* The program of `cargo xtask bench program`: BYTES of malloc memory, one access per page in each phase.
 *
 * Pages halve under compression: eight runs of 256 random bytes with as many zeros between them. Every access checks
 * what it reads. At the end one line of JSON says microseconds per access for each phase; with a second argument
 * the program then waits for the end of its input, so that somebody can look at its memory.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, PAGE_WORDS = 512, RUN_WORDS = 32 };

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

static uint64_t seed = 1;

static size_t random_page(size_t pages)
{
	seed += 0x9e3779b97f4a7c15u;
	return scramble(seed) % pages;
}

static void fill(uint64_t *words, size_t page)
{
	uint64_t state = scramble(page + 1);
	for (size_t word = 0; word < PAGE_WORDS; word++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		words[word] = word / RUN_WORDS % 2 ? 0 : state;
	}
	words[0] = scramble(page);
}

static void check(const volatile uint64_t *words, size_t page)
{
	if (words[0] != scramble(page)) {
		fprintf(stderr, "page %zu does not hold what it should\n", page);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	size_t pages = argc > 1 ? strtoull(argv[1], NULL, 10) / PAGE_BYTES : 0;
	if (pages == 0) {
		fprintf(stderr, "usage: bench_access BYTES [wait]\n");
		return 2;
	}
	char *memory = malloc((pages + 1) * PAGE_BYTES);
	if (!memory) {
		fprintf(stderr, "no memory\n");
		return 1;
	}
	uint64_t *data = (uint64_t *)(((uintptr_t)memory + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES);
	double times[5];
	times[0] = now_us();
	for (size_t page = 0; page < pages; page++)
		fill(data + page * PAGE_WORDS, page);
	times[1] = now_us();
	for (size_t page = 0; page < pages; page++)
		check(data + page * PAGE_WORDS, page);
	times[2] = now_us();
	for (size_t nth = 0; nth < pages; nth++) {
		size_t page = random_page(pages);
		check(data + page * PAGE_WORDS, page);
	}
	times[3] = now_us();
	for (size_t nth = 0; nth < pages; nth++) {
		size_t page = random_page(pages);
		check(data + page * PAGE_WORDS, page);
		data[page * PAGE_WORDS + 1] = nth;
	}
	times[4] = now_us();
	const char *names[] = {"fill", "sequential read", "random read", "random write"};
	printf("{");
	for (int phase = 0; phase < 4; phase++)
		printf("\"%s\": %.4f, ", names[phase], (times[phase + 1] - times[phase]) / pages);
	printf("\"pid\": %d}\n", (int)getpid());
	fflush(stdout);
	if (argc > 2)
		while (getchar() != EOF)
			;
	return 0;
}
