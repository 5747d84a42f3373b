/* io_uring in memory that comes and goes: reads and writes, plain and by registered buffers, are in flight all the time,
 * while another thread sweeps over more memory than there is. Usage: uring MIB SECONDS DIRECTORY
 *
 * One half of the memory is buffers, the other is swept. What a page of memory or of the file must hold is one number,
 * its stamp; 0 stands for zeros. A page that a request is working on is nobody else's. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Each request in flight may keep LONGEST pages pinned, and a whole region that has been given back since: 12 MiB at most. */
enum { PAGE = 4096, WORDS = PAGE / 8, REGION = 32 /* pages */, REGISTERED = 12, DEPTH = 64, LONGEST = 16 };

struct request { size_t page, file, pages; int write, live; };

static unsigned char *buffers, *swept;
static size_t pages;                       /* of each half, and of the file */
static uint64_t *stamp_of, *file_stamp;    /* what the pages hold */
static unsigned char *busy, *file_busy;    /* whether a request works on them */
static struct request request[DEPTH];
static size_t registered[REGISTERED];      /* the first page of each registered region */
static int registrations, without_registration;
static uint64_t fixed, plain, direct;
static volatile int done;

/* The ring. */
static int ring;
static unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
static struct io_uring_sqe *sqes;
static struct io_uring_cqe *cqes;

static void fail(const char *what, size_t at, int error) {
    printf("wrong: %s, page %zu: %s\n", what, at, error ? strerror(error) : "other bytes");
    fflush(stdout);
    _exit(1);
}

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static uint64_t state = 1;
static size_t below(size_t n) { return mix(state += 0x9e3779b97f4a7c15u) % n; }

static void put(unsigned char *at, uint64_t stamp) {
    uint64_t *words = (uint64_t *)at;
    for (int k = 0; k < WORDS; k++) words[k] = stamp ? mix(stamp * WORDS + k) : 0;
}

static void check(const unsigned char *at, uint64_t stamp, const char *what, size_t page) {
    const uint64_t *words = (const uint64_t *)at;
    for (int k = 0; k < WORDS; k++) if (words[k] != (stamp ? mix(stamp * WORDS + k) : 0)) fail(what, page, 0);
}

static void *sweep(void *arg) {
    uint64_t *expected = calloc(pages, sizeof *expected), next = 1u << 31;
    for (unsigned round = 0; !done; round++)
        for (size_t p = 0; p < pages && !done; p++) {
            check(swept + p * PAGE, expected[p], "swept", p);
            if ((p + round) % 3 == 0) put(swept + p * PAGE, expected[p] = ++next);
        }
    for (size_t p = 0; p < pages; p++) check(swept + p * PAGE, expected[p], "swept, at the end", p);
    free(expected);
    return arg;
}

static void make_ring(void) {
    struct io_uring_params made = {0};
    ring = syscall(SYS_io_uring_setup, DEPTH, &made);
    if (ring < 0 && (errno == ENOSYS || errno == EPERM)) {
        fprintf(stderr, "not checked: this machine forbids io_uring\n");
        printf("ok\n");
        exit(0);
    }
    if (ring < 0) fail("io_uring_setup", 0, errno);
    if (!(made.features & IORING_FEAT_SINGLE_MMAP)) fail("an old io_uring", 0, ENOSYS);
    size_t sq = made.sq_off.array + made.sq_entries * sizeof(unsigned);
    size_t cq = made.cq_off.cqes + made.cq_entries * sizeof(struct io_uring_cqe);
    unsigned char *rings = mmap(0, sq > cq ? sq : cq, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
    sqes = mmap(0, made.sq_entries * sizeof *sqes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQES);
    if (rings == MAP_FAILED || sqes == MAP_FAILED) fail("mapping the ring", 0, errno);
    sq_tail = (unsigned *)(rings + made.sq_off.tail);
    sq_mask = (unsigned *)(rings + made.sq_off.ring_mask);
    sq_array = (unsigned *)(rings + made.sq_off.array);
    cq_head = (unsigned *)(rings + made.cq_off.head);
    cq_tail = (unsigned *)(rings + made.cq_off.tail);
    cq_mask = (unsigned *)(rings + made.cq_off.ring_mask);
    cqes = (struct io_uring_cqe *)(rings + made.cq_off.cqes);
}

/* Gives back the registered regions, whatever is in flight, and registers others. */
static void renew_registration(void) {
    if (registrations > 0 && syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, 0, 0)) fail("unregister", 0, errno);
    struct iovec list[REGISTERED];
    for (int k = 0; k < REGISTERED; k++) {
        registered[k] = below(pages / REGION) * REGION;
        list[k] = (struct iovec){ buffers + registered[k] * PAGE, REGION * PAGE };
    }
    if (!syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, list, REGISTERED)) {
        registrations++;
        return;
    }
    if (errno != ENOMEM && errno != EPERM) fail("register", 0, errno);
    fprintf(stderr, "registered buffers are not checked: %s\n", strerror(errno));
    without_registration = 1;
    registrations = 0;
}

static int is_free(const unsigned char *marks, size_t first, size_t count) {
    for (size_t k = 0; k < count; k++) if (marks[first + k]) return 0;
    return 1;
}

static int is_registered(size_t region) {
    for (int k = 0; registrations && k < REGISTERED; k++) if (registered[k] == region) return 1;
    return 0;
}

/* Drops a region that is neither in use nor registered: it reads as zeros from then on. */
static void drop_region(void) {
    size_t region = below(pages / REGION) * REGION;
    if (!is_free(busy, region, REGION) || is_registered(region)) return;
    if (madvise(buffers + region * PAGE, REGION * PAGE, MADV_DONTNEED)) fail("madvise", region, errno);
    memset(stamp_of + region, 0, REGION * sizeof *stamp_of);
}

/* Queues a request; answers whether the pages that it chose were free. */
static int queue(int fd, int number) {
    static uint64_t next;
    size_t count = 1 + below(LONGEST), file = below(pages - count), page;
    int by_number = registrations && below(2), which = below(REGISTERED), write = below(2);
    page = by_number ? registered[which] + below(REGION - count) : below(pages - count);
    if (!is_free(busy, page, count) || !is_free(file_busy, file, count)) return 0;
    if (write && below(2))
        for (size_t k = 0; k < count; k++) put(buffers + (page + k) * PAGE, stamp_of[page + k] = ++next);
    memset(busy + page, 1, count);
    memset(file_busy + file, 1, count);
    request[number] = (struct request){ page, file, count, write, 1 };
    unsigned slot = *sq_tail & *sq_mask;
    struct io_uring_sqe *sqe = &sqes[slot];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = by_number ? (write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED) : (write ? IORING_OP_WRITE : IORING_OP_READ);
    /* Some are done by the kernel's own threads, which fault like any other. Not those with registered buffers: these
     * threads look the number up when they get to it, and by then it may be another region's. */
    sqe->flags = !by_number && below(4) == 0 ? IOSQE_ASYNC : 0;
    sqe->fd = fd;
    sqe->off = file * PAGE;
    sqe->addr = (uintptr_t)(buffers + page * PAGE);
    sqe->len = count * PAGE;
    sqe->buf_index = by_number ? which : 0;
    sqe->user_data = number;
    sq_array[slot] = slot;
    __atomic_store_n(sq_tail, *sq_tail + 1, __ATOMIC_RELEASE);
    by_number ? fixed++ : plain++;
    return 1;
}

/* Checks what a request has read, and that one that wrote has left its buffer alone. */
static void conclude(const struct io_uring_cqe *cqe) {
    struct request *r = &request[cqe->user_data];
    const char *what = r->write ? "after a write" : "after a read";
    if (cqe->res < 0) fail(what, r->page, -cqe->res);
    if ((size_t)cqe->res != r->pages * PAGE) fail("a short transfer", r->page, EIO);
    for (size_t k = 0; k < r->pages; k++) {
        if (r->write) file_stamp[r->file + k] = stamp_of[r->page + k];
        else stamp_of[r->page + k] = file_stamp[r->file + k];
        check(buffers + (r->page + k) * PAGE, stamp_of[r->page + k], what, r->page + k);
    }
    memset(busy + r->page, 0, r->pages);
    memset(file_busy + r->file, 0, r->pages);
    r->live = 0;
}

static int reap(void) {
    int count = 0;
    while (*cq_head != __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE)) {
        conclude(&cqes[*cq_head & *cq_mask]);
        __atomic_store_n(cq_head, *cq_head + 1, __ATOMIC_RELEASE);
        count++;
    }
    return count;
}

static void enter(unsigned submitted, unsigned awaited) {
    while (submitted > 0 || awaited > 0) {
        int taken = syscall(SYS_io_uring_enter, ring, submitted, awaited, awaited ? IORING_ENTER_GETEVENTS : 0, 0, 0);
        if (taken < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY) fail("io_uring_enter", 0, errno);
        if (taken >= 0) { submitted -= taken; awaited = 0; }
    }
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    size_t bytes = (strtoul(argv[1], 0, 0) << 20) / 2;
    time_t seconds = atoi(argv[2]);
    pages = bytes / PAGE;
    char path[4096];
    snprintf(path, sizeof path, "%s/pgmap-test-uring-%d", argv[3], getpid());
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
    direct = fd >= 0;
    if (fd < 0) fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || unlink(path) || ftruncate(fd, bytes)) fail("the file", 0, errno);
    buffers = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    swept = aligned_alloc(PAGE, bytes);
    if (buffers == MAP_FAILED || !swept) fail("memory", 0, ENOMEM);
    memset(swept, 0, bytes);
    stamp_of = calloc(pages, sizeof *stamp_of);
    file_stamp = calloc(pages, sizeof *file_stamp);
    busy = calloc(pages, 1);
    file_busy = calloc(pages, 1);
    make_ring();
    for (size_t p = 0; p < pages; p++) put(buffers + p * PAGE, stamp_of[p] = (uint64_t)1 << 40 | p);
    pthread_t sweeper;
    pthread_create(&sweeper, 0, sweep, 0);
    unsigned in_flight = 0;
    time_t end = time(0) + seconds;
    for (uint64_t turn = 0; time(0) < end; turn++) {
        if (!without_registration && turn % 8 == 0) renew_registration();
        if (turn % 4 == 0) drop_region();
        unsigned queued = 0;
        for (int number = 0; number < DEPTH; number++) if (!request[number].live) queued += queue(fd, number);
        in_flight += queued;
        enter(queued, in_flight ? 1 : 0);
        in_flight -= reap();
    }
    while (in_flight > 0) {
        enter(0, 1);
        in_flight -= reap();
    }
    done = 1;
    pthread_join(sweeper, 0);
    for (size_t p = 0; p < pages; p++) check(buffers + p * PAGE, stamp_of[p], "a buffer, at the end", p);
    /* The registered pages leave RAM again, and the file holds what was written. */
    if (registrations && syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, 0, 0)) fail("unregister", 0, errno);
    if (pread(fd, buffers, bytes, 0) != (ssize_t)bytes) fail("reading the file", 0, errno);
    for (size_t p = 0; p < pages; p++) check(buffers + p * PAGE, file_stamp[p], "the file, at the end", p);
    if (getenv("URING_TELL"))
        fprintf(stderr, "%lu plain, %lu fixed, %d registrations, %s\n", plain, fixed, registrations, direct ? "O_DIRECT" : "buffered");
    printf("ok\n");
    return 0;
}
