/*
 * aio: direct I/O that no thread waits for, by libaio's or io_uring's system calls.
 *
 *   aio libaio|uring into FILE SOURCE   map FILE shared; on a line of input begin to read 2 pages of
 *                                       SOURCE into its pages 3 and 4 and say "submitted"; on the
 *                                       next wait for the end and say "same" or "lost"
 *   aio libaio|uring storm FILE SEED    read and write single pages of FILE, 8 at a time, until a
 *                                       line comes; each page read must hold what was written last;
 *                                       say how many were
 *
 * A page that was written holds its number and the write's in each word.  Any failure ends the
 * program with a message and status 1.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096UL
#define AT_ONCE 8
#define CHECK(condition) ((condition) ? (void)0 : failed(#condition, __LINE__))

static void failed(const char *what, int line)
{
	fprintf(stderr, "aio: line %d: %s: ", line, what);
	perror("");
	exit(1);
}

static int uring;
static aio_context_t context;
static int ring_fd;
static struct io_uring_params params;
static char *sq, *cq;
static struct io_uring_sqe *sqes;

static void set_up(void)
{
	if (!uring) {
		CHECK(syscall(SYS_io_setup, AT_ONCE, &context) == 0);
		return;
	}
	ring_fd = syscall(SYS_io_uring_setup, AT_ONCE, &params);
	CHECK(ring_fd >= 0);
	int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
	sq = mmap(NULL, params.sq_off.array + params.sq_entries * sizeof(unsigned), prot, flags,
		  ring_fd, IORING_OFF_SQ_RING);
	cq = mmap(NULL, params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe), prot,
		  flags, ring_fd, IORING_OFF_CQ_RING);
	sqes = mmap(NULL, params.sq_entries * sizeof(*sqes), prot, flags, ring_fd, IORING_OFF_SQES);
	CHECK(sq != MAP_FAILED && cq != MAP_FAILED && sqes != MAP_FAILED);
}

/* Begin one transfer of FD at OFFSET; its number comes back at its end. */
static void submit(int fd, int writes, void *buffer, size_t size, off_t offset, unsigned number)
{
	if (!uring) {
		struct iocb call = {
			.aio_data = number,
			.aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD,
			.aio_fildes = fd,
			.aio_buf = (uintptr_t)buffer,
			.aio_nbytes = size,
			.aio_offset = offset,
		};
		struct iocb *calls[] = { &call };
		CHECK(syscall(SYS_io_submit, context, 1, calls) == 1);
		return;
	}
	unsigned *tail = (unsigned *)(sq + params.sq_off.tail);
	unsigned slot = *tail & *(unsigned *)(sq + params.sq_off.ring_mask);
	sqes[slot] = (struct io_uring_sqe){
		.opcode = writes ? IORING_OP_WRITE : IORING_OP_READ,
		.flags = IOSQE_ASYNC, /* or the call itself may wait for the answer */
		.fd = fd,
		.addr = (uintptr_t)buffer,
		.len = size,
		.off = offset,
		.user_data = number,
	};
	((unsigned *)(sq + params.sq_off.array))[slot] = slot;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	CHECK(syscall(SYS_io_uring_enter, ring_fd, 1, 0, 0, NULL, 0) == 1);
}

/* Wait for the end of one transfer, which must be whole; return its number. */
static unsigned finish(size_t size)
{
	if (!uring) {
		struct io_event event;
		CHECK(syscall(SYS_io_getevents, context, 1, 1, &event, NULL) == 1);
		CHECK((size_t)event.res == size);
		return event.data;
	}
	unsigned *head = (unsigned *)(cq + params.cq_off.head);
	unsigned *tail = (unsigned *)(cq + params.cq_off.tail);
	while (__atomic_load_n(tail, __ATOMIC_ACQUIRE) == *head)
		CHECK(syscall(SYS_io_uring_enter, ring_fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) >= 0);
	struct io_uring_cqe *cqes = (struct io_uring_cqe *)(cq + params.cq_off.cqes);
	struct io_uring_cqe *end = &cqes[*head & *(unsigned *)(cq + params.cq_off.ring_mask)];
	CHECK((size_t)end->res == size);
	unsigned number = end->user_data;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return number;
}

static void await_line(void)
{
	char line[8];
	CHECK(fgets(line, sizeof(line), stdin));
}

static int into(const char *file, const char *source)
{
	static char expected[2 * PAGE];
	int fd = open(file, O_RDWR), from = open(source, O_RDONLY | O_DIRECT);
	struct stat status;
	CHECK(fd >= 0 && from >= 0);
	/* Sizes and times are asked for now.  If FILE's turned out to be new later, the kernel would
	 * drop its pages (FUSE_AUTO_INVAL_DATA), pinned or not; and of SOURCE the read alone is to
	 * be asked for. */
	CHECK(fstat(fd, &status) == 0 && fstat(from, &status) == 0);
	char *memory = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(memory != MAP_FAILED);
	puts("ready");
	await_line();
	submit(from, 0, memory + 3 * PAGE, 2 * PAGE, 0, 0);
	puts("submitted");
	await_line();
	finish(2 * PAGE);
	int plain = open(source, O_RDONLY);
	CHECK(pread(plain, expected, 2 * PAGE, 0) == 2 * PAGE);
	puts(memcmp(memory + 3 * PAGE, expected, 2 * PAGE) ? "lost" : "same");
	await_line();
	return 0;
}

static void fill(uint64_t *words, unsigned page, unsigned version)
{
	for (size_t word = 0; word < PAGE / sizeof(*words); word++)
		words[word] = (uint64_t)page << 32 | version;
}

static int storm(const char *file, unsigned seed)
{
	int fd = open(file, O_RDWR | O_DIRECT);
	CHECK(fd >= 0);
	struct stat status;
	CHECK(fstat(fd, &status) == 0);
	unsigned pages = status.st_size / PAGE, transfers = 0;
	unsigned *versions = calloc(pages, sizeof(*versions));
	uint64_t *buffers[AT_ONCE], *expected = malloc(PAGE);
	for (int n = 0; n < AT_ONCE; n++)
		CHECK(posix_memalign((void **)&buffers[n], PAGE, PAGE) == 0);
	struct pollfd input = { .fd = 0, .events = POLLIN };
	srandom(seed);
	while (poll(&input, 1, 0) == 0) {
		unsigned page[AT_ONCE];
		int writes[AT_ONCE];
		unsigned first = random() % (pages / AT_ONCE);
		for (unsigned n = 0; n < AT_ONCE; n++) {
			page[n] = first + n * (pages / AT_ONCE); /* no two are one page */
			writes[n] = random() % 2;
			if (writes[n])
				fill(buffers[n], page[n], ++versions[page[n]]);
			else
				memset(buffers[n], 0xee, PAGE);
			submit(fd, writes[n], buffers[n], PAGE, page[n] * PAGE, n);
		}
		for (int count = 0; count < AT_ONCE; count++) {
			unsigned n = finish(PAGE);
			fill(expected, page[n], versions[page[n]]);
			if (!writes[n] && memcmp(buffers[n], expected, PAGE)) {
				fprintf(stderr, "page %u: %#lx read, %#lx written last\n", page[n],
					(unsigned long)buffers[n][0], (unsigned long)expected[0]);
				return 1;
			}
			transfers++;
		}
	}
	for (unsigned n = 0; n < pages; n++) {
		fill(expected, n, versions[n]);
		CHECK(pread(fd, buffers[0], PAGE, n * PAGE) == PAGE);
		CHECK(memcmp(buffers[0], expected, PAGE) == 0);
	}
	printf("%u\n", transfers);
	return 0;
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc != 5)
		return 1;
	uring = strcmp(argv[1], "uring") == 0;
	set_up();
	return strcmp(argv[2], "into") == 0 ? into(argv[3], argv[4]) : storm(argv[3], atoi(argv[4]));
}
