/*
 * bench_io: the load of tools/bench, the same binary for every filesystem it compares.
 *
 *   bench_io mmap FILE SEED          map FILE read-only and touch each page once, in random order
 *                                    (cold); unmap the pages and touch them again in another
 *                                    random order (warm)
 *   bench_io fsync FILE SEED COUNT   COUNT times: pwrite 4 KiB at a random page, then fsync
 *   bench_io loop FILE STRIDE PASSES touch every STRIDEth page, PASSES times, unmapping them with
 *                                    MADV_DONTNEED between; a first pass, not counted, warms them
 *   bench_io open FILE COUNT         open and close FILE COUNT times; the first time is told apart
 *   bench_io calls COUNT             call getppid(2) COUNT times
 *
 * A random order is a function of SEED and the number of pages only.  One line of JSON says how
 * long the measured part took, how many faults the kernel charged to it, and a checksum of the
 * bytes touched, which must be the same on filesystems that hold the same file.  Opening, mapping
 * and unmapping are outside the measured part.  Any failure ends the program with a message and
 * status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

struct file {
	int descriptor;
	size_t pages;
	volatile unsigned char *base; /* NULL until mapped */
};

/* One measured part; times and faults add up over several begin/end pairs. */
struct measure {
	int64_t ns;
	long minflt;
	long majflt;
	struct timespec start;
	struct rusage usage;
};

static void fail(const char *what)
{
	fprintf(stderr, "bench_io: %s: %s\n", what, strerror(errno));
	exit(1);
}

static unsigned long number(const char *word)
{
	char *rest;
	unsigned long value = strtoul(word, &rest, 10);

	if (*rest || rest == word) {
		fprintf(stderr, "bench_io: %s is not a number\n", word);
		exit(1);
	}
	return value;
}

static void begin(struct measure *measure)
{
	getrusage(RUSAGE_SELF, &measure->usage);
	clock_gettime(CLOCK_MONOTONIC, &measure->start);
}

static void end(struct measure *measure)
{
	struct timespec now;
	struct rusage usage;

	clock_gettime(CLOCK_MONOTONIC, &now);
	getrusage(RUSAGE_SELF, &usage);
	measure->ns += (now.tv_sec - measure->start.tv_sec) * INT64_C(1000000000) +
		       (now.tv_nsec - measure->start.tv_nsec);
	measure->minflt += usage.ru_minflt - measure->usage.ru_minflt;
	measure->majflt += usage.ru_majflt - measure->usage.ru_majflt;
}

static void print_measure(const char *name, const struct measure *measure)
{
	printf("\"%s\": {\"ns\": %lld, \"minflt\": %ld, \"majflt\": %ld}", name,
	       (long long)measure->ns, measure->minflt, measure->majflt);
}

/* The splitmix generator: a step of a Weyl sequence, then mixed. */
static uint64_t next_random(uint64_t *state)
{
	uint64_t mixed = *state += UINT64_C(0x9e3779b97f4a7c15);

	mixed = (mixed ^ (mixed >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	mixed = (mixed ^ (mixed >> 27)) * UINT64_C(0x94d049bb133111eb);
	return mixed ^ (mixed >> 31);
}

static uint32_t *shuffled(size_t count, uint64_t *state)
{
	uint32_t *order = malloc(count * sizeof(*order));

	if (!order)
		fail("malloc");
	for (size_t i = 0; i < count; i++) {
		size_t other = next_random(state) % (i + 1);

		order[i] = order[other];
		order[other] = (uint32_t)i;
	}
	return order;
}

static struct file open_file(const char *path, int flags)
{
	struct stat status;
	struct file file = { open(path, flags), 0, NULL };

	if (file.descriptor < 0 || fstat(file.descriptor, &status) < 0)
		fail(path);
	file.pages = (size_t)status.st_size / PAGE;
	if (!file.pages) {
		errno = EINVAL;
		fail("a file of at least one whole page is needed");
	}
	return file;
}

static void map_file(struct file *file)
{
	void *base = mmap(NULL, file->pages * PAGE, PROT_READ, MAP_SHARED, file->descriptor, 0);

	if (base == MAP_FAILED)
		fail("mmap");
	file->base = base;
}

static void unmap_pages(const struct file *file)
{
	if (madvise((void *)file->base, file->pages * PAGE, MADV_DONTNEED))
		fail("madvise");
}

static uint64_t touch_in_order(const struct file *file, const uint32_t *order,
			       struct measure *measure)
{
	uint64_t sum = 0;

	begin(measure);
	for (size_t i = 0; i < file->pages; i++)
		sum += (uint64_t)file->base[order[i] * PAGE + order[i] % PAGE] * (order[i] + 1);
	end(measure);
	return sum;
}

static void random_mmap(const char *path, uint64_t seed)
{
	struct file file = open_file(path, O_RDONLY);
	struct measure cold = { 0 }, warm = { 0 };
	uint32_t *first = shuffled(file.pages, &seed);
	uint32_t *second = shuffled(file.pages, &seed);

	map_file(&file);
	uint64_t sum = touch_in_order(&file, first, &cold);
	unmap_pages(&file);
	if (touch_in_order(&file, second, &warm) != sum) {
		fprintf(stderr, "bench_io: the bytes changed between two reads\n");
		exit(1);
	}
	printf("{\"pages\": %zu, \"checksum\": %llu, ", file.pages, (unsigned long long)sum);
	print_measure("cold", &cold);
	printf(", ");
	print_measure("warm", &warm);
	printf("}\n");
	free(first);
	free(second);
}

static void write_and_sync(const char *path, uint64_t seed, size_t count)
{
	struct file file = open_file(path, O_RDWR);
	struct measure measure = { 0 };
	static unsigned char bytes[PAGE];

	begin(&measure);
	for (size_t i = 0; i < count; i++) {
		off_t offset = (off_t)(next_random(&seed) % file.pages * PAGE);

		memset(bytes, (int)(next_random(&seed) & 0xff), PAGE);
		if (pwrite(file.descriptor, bytes, PAGE, offset) != (ssize_t)PAGE)
			fail("pwrite");
		if (fsync(file.descriptor))
			fail("fsync");
	}
	end(&measure);
	printf("{\"writes\": %zu, ", count);
	print_measure("fsync", &measure);
	printf("}\n");
}

static uint64_t touch_strided(const struct file *file, size_t stride)
{
	uint64_t sum = 0;

	for (size_t page = 0; page < file->pages; page += stride)
		sum += file->base[page * PAGE];
	return sum;
}

static void fault_loop(const char *path, size_t stride, size_t passes)
{
	/* For writing: a shared mapping that may not be written cannot be registered (exact mode). */
	struct file file = open_file(path, O_RDWR);
	struct measure measure = { 0 };

	map_file(&file);
	uint64_t sum = touch_strided(&file, stride);
	for (size_t pass = 0; pass < passes; pass++) {
		unmap_pages(&file);
		begin(&measure);
		uint64_t again = touch_strided(&file, stride);
		end(&measure);
		if (again != sum) {
			fprintf(stderr, "bench_io: the bytes changed between two reads\n");
			exit(1);
		}
	}
	printf("{\"touches\": %zu, \"checksum\": %llu, ",
	       (file.pages + stride - 1) / stride * passes, (unsigned long long)sum);
	print_measure("loop", &measure);
	printf("}\n");
}

static int64_t since_ns(const struct timespec *start)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (now.tv_sec - start->tv_sec) * INT64_C(1000000000) + (now.tv_nsec - start->tv_nsec);
}

static void open_again_and_again(const char *path, size_t count)
{
	struct timespec start;
	int64_t first_ns = 0;

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (size_t i = 0; i <= count; i++) {
		close(open_file(path, O_RDONLY).descriptor);
		if (!i) {
			first_ns = since_ns(&start);
			clock_gettime(CLOCK_MONOTONIC, &start);
		}
	}
	printf("{\"first_ns\": %lld, \"count\": %zu, \"ns\": %lld}\n", (long long)first_ns, count,
	       (long long)since_ns(&start));
}

static void call_again_and_again(size_t count)
{
	struct timespec start;

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (size_t i = 0; i < count; i++)
		syscall(SYS_getppid);
	printf("{\"calls\": %zu, \"ns\": %lld}\n", count, (long long)since_ns(&start));
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "mmap"))
		random_mmap(argv[2], number(argv[3]));
	else if (argc == 5 && !strcmp(argv[1], "fsync"))
		write_and_sync(argv[2], number(argv[3]), number(argv[4]));
	else if (argc == 5 && !strcmp(argv[1], "loop") && number(argv[3]))
		fault_loop(argv[2], number(argv[3]), number(argv[4]));
	else if (argc == 4 && !strcmp(argv[1], "open") && number(argv[3]))
		open_again_and_again(argv[2], number(argv[3]));
	else if (argc == 3 && !strcmp(argv[1], "calls"))
		call_again_and_again(number(argv[2]));
	else {
		fprintf(stderr, "usage: bench_io mmap FILE SEED | fsync FILE SEED COUNT | "
				"loop FILE STRIDE PASSES | open FILE COUNT | calls COUNT\n");
		return 2;
	}
	return 0;
}
