/*
 * touch: do to memory what the command line says, and tell what the kernel charged for it.
 *
 * Tests and the demo drive it with commands, in order, from the arguments or, given "-" alone, from
 * lines of standard input.  Pages are numbered within the current mapping (the last one mapped,
 * moved or chosen); a range is A-B with both ends included, or one page A.
 *
 *   map FILE private|shared r|rw [populate]   map the whole file; it becomes the current mapping
 *   part FILE private|shared r|rw OFF N       map N pages from page OFF of the file
 *   use N                 make mapping N (0 first) the current one
 *   read A-B, write A-B   touch one byte of each page, in order
 *   unmap A-B             munmap
 *   protect A-B r|rw|none mprotect
 *   remap N               mremap to N pages, free to move
 *   advise A-B ADVICE     madvise: dontneed, dontfork, random, populate_read, populate_write, free,
 *                         pageout
 *   lock A-B              mlock
 *   pwrite A FILE         write(2) page A to FILE: the kernel reads it, maybe faulting
 *   direct A-B FILE       read(2) with O_DIRECT from FILE into the pages: the kernel writes them
 *   repeat N { ... }      the commands up to }, N times
 *   fork { ... }          the commands up to } run in a child; then wait for it
 *   thread { ... }        the same in a thread beside the following commands; "join" waits for all
 *   exec FILE             run FILE with no arguments in a child, and wait for it
 *   become FILE ...       exec FILE with the remaining arguments, in this process
 *   mark NAME             print "NAME minflt=N majflt=N" since the last mark, of the calling thread
 *   pause                 print "paused" and wait for a line on standard input
 *   sleep MS              sleep
 *   spin MS               stay busy in user mode
 *
 * Any failure ends the program with a message and status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define MAX_MAPPINGS 64
#define MAX_THREADS 64
#define MAX_WORDS 4096

struct mapping {
	volatile unsigned char *base;
	size_t pages;
};

static struct mapping mappings[MAX_MAPPINGS];
static int mapping_count;
static pthread_t threads[MAX_THREADS];
static int thread_count;
static volatile unsigned char sink;

/* What a command sequence works on: each thread has its own cursor, mapping and counts. */
struct run {
	char **words;
	int at;
	int end;
	int current;
	struct rusage base;
};

static void run_commands(struct run *run);

__attribute__((noreturn, format(printf, 1, 2)))
static void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fprintf(stderr, "touch: ");
	vfprintf(stderr, format, arguments);
	fprintf(stderr, "\n");
	va_end(arguments);
	exit(1);
}

static const char *next(struct run *run)
{
	if (run->at >= run->end)
		fail("a command lacks an argument");
	return run->words[run->at++];
}

static size_t next_number(struct run *run)
{
	const char *word = next(run);
	char *rest;
	unsigned long value = strtoul(word, &rest, 10);

	if (*rest || rest == word)
		fail("%s is not a number", word);
	return value;
}

static void next_range(struct run *run, size_t *first, size_t *last)
{
	const char *word = next(run);
	char *rest;

	*first = *last = strtoul(word, &rest, 10);
	if (*rest == '-')
		*last = strtoul(rest + 1, &rest, 10);
	if (*rest || *last < *first)
		fail("%s is not a range A-B", word);
}

static struct mapping *current(struct run *run)
{
	if (run->current >= mapping_count)
		fail("nothing is mapped yet");
	return &mappings[run->current];
}

static volatile unsigned char *page(struct run *run, size_t number)
{
	struct mapping *mapping = current(run);

	if (number >= mapping->pages)
		fail("page %zu is outside the mapping of %zu pages", number, mapping->pages);
	return mapping->base + number * PAGE;
}

static int protection(const char *word)
{
	if (!strcmp(word, "r"))
		return PROT_READ;
	if (!strcmp(word, "rw"))
		return PROT_READ | PROT_WRITE;
	if (!strcmp(word, "none"))
		return PROT_NONE;
	fail("%s is not r, rw or none", word);
}

static void add_mapping(struct run *run, int part)
{
	const char *file = next(run);
	int flags = strcmp(next(run), "shared") ? MAP_PRIVATE : MAP_SHARED;
	int prot = protection(next(run));
	size_t offset = 0, pages;
	struct stat status;
	int shared_rw = flags == MAP_SHARED && (prot & PROT_WRITE);
	int descriptor = open(file, shared_rw ? O_RDWR : O_RDONLY);

	if (descriptor < 0 || fstat(descriptor, &status) < 0)
		fail("%s: %s", file, strerror(errno));
	pages = (status.st_size + PAGE - 1) / PAGE;
	if (part) {
		offset = next_number(run);
		pages = next_number(run);
	} else if (run->at < run->end && !strcmp(run->words[run->at], "populate")) {
		run->at++;
		flags |= MAP_POPULATE;
	}
	if (mapping_count == MAX_MAPPINGS)
		fail("more than %d mappings", MAX_MAPPINGS);
	void *base = mmap(NULL, pages * PAGE, prot, flags, descriptor, offset * PAGE);
	if (base == MAP_FAILED)
		fail("mmap %s: %s", file, strerror(errno));
	close(descriptor);
	run->current = mapping_count;
	mappings[mapping_count++] = (struct mapping){ base, pages };
}

static void touch(struct run *run, int write)
{
	size_t first, last;

	next_range(run, &first, &last);
	for (size_t number = first; number <= last; number++) {
		volatile unsigned char *byte = page(run, number) + number % PAGE;

		if (write)
			*byte = (unsigned char)number;
		else
			sink = *byte;
	}
}

static void advise(struct run *run)
{
	static const struct { const char *name; int advice; } known[] = {
		{ "dontneed", MADV_DONTNEED }, { "dontfork", MADV_DONTFORK },
		{ "random", MADV_RANDOM }, { "free", MADV_FREE },
		{ "pageout", 21 }, { "populate_read", 22 }, { "populate_write", 23 },
	};
	size_t first, last;

	next_range(run, &first, &last);
	const char *name = next(run);
	for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
		if (strcmp(name, known[i].name))
			continue;
		if (madvise((void *)page(run, first), (last - first + 1) * PAGE, known[i].advice))
			fail("madvise %s: %s", name, strerror(errno));
		return;
	}
	fail("unknown advice %s", name);
}

static void change_range(struct run *run, const char *command)
{
	size_t first, last;

	next_range(run, &first, &last);
	void *base = (void *)page(run, first);
	size_t length = (last - first + 1) * PAGE;
	int result;
	if (!strcmp(command, "unmap"))
		result = munmap(base, length);
	else if (!strcmp(command, "lock"))
		result = mlock(base, length);
	else
		result = mprotect(base, length, protection(next(run)));
	if (result)
		fail("%s: %s", command, strerror(errno));
}

static void remap(struct run *run)
{
	struct mapping *mapping = current(run);
	size_t pages = next_number(run);
	void *base = mremap((void *)mapping->base, mapping->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);

	if (base == MAP_FAILED)
		fail("mremap: %s", strerror(errno));
	*mapping = (struct mapping){ base, pages };
}

static void write_out(struct run *run)
{
	volatile unsigned char *from = page(run, next_number(run));
	const char *file = next(run);
	int descriptor = open(file, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	if (descriptor < 0 || write(descriptor, (void *)from, PAGE) != (ssize_t)PAGE)
		fail("%s: %s", file, strerror(errno));
	close(descriptor);
}

static void read_directly(struct run *run)
{
	size_t first, last;

	next_range(run, &first, &last);
	void *base = (void *)page(run, first);
	const char *file = next(run);
	int descriptor = open(file, O_RDONLY | O_DIRECT);

	if (descriptor < 0 || pread(descriptor, base, (last - first + 1) * PAGE, 0) < (ssize_t)PAGE)
		fail("%s: %s", file, strerror(errno));
	close(descriptor);
}

static void wait_for(pid_t child)
{
	int status;

	if (child < 0 || waitpid(child, &status, 0) < 0)
		fail("fork or wait: %s", strerror(errno));
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		fail("a child failed (status %#x)", status);
}

/* Return the block behind "{" as a run of its own and skip it. */
static struct run block(struct run *run)
{
	struct run inner = *run;
	int depth = 1;

	if (strcmp(next(run), "{"))
		fail("a block starts with {");
	inner.at = run->at;
	while (depth) {
		const char *word = next(run);
		depth += !strcmp(word, "{");
		depth -= !strcmp(word, "}");
	}
	inner.end = run->at - 1;
	return inner;
}

static void mark(struct run *run, const char *name)
{
	struct rusage now;

	getrusage(RUSAGE_THREAD, &now);
	if (name) {
		printf("%s minflt=%ld majflt=%ld\n", name, now.ru_minflt - run->base.ru_minflt,
		       now.ru_majflt - run->base.ru_majflt);
		fflush(stdout);
	}
	getrusage(RUSAGE_THREAD, &run->base);
}

static void *thread_main(void *argument)
{
	struct run inner = *(struct run *)argument;

	free(argument);
	mark(&inner, NULL);
	run_commands(&inner);
	return NULL;
}

static void start_thread(struct run *run)
{
	struct run *inner = malloc(sizeof(*inner));

	if (!inner || thread_count == MAX_THREADS)
		fail("cannot start another thread");
	*inner = block(run);
	if (pthread_create(&threads[thread_count++], NULL, thread_main, inner))
		fail("pthread_create failed");
}

static void repeat(struct run *run)
{
	size_t times = next_number(run);
	struct run inner = block(run);
	int first = inner.at;

	for (; times; times--) {
		inner.at = first;
		run_commands(&inner);
	}
}

static void run_block_in_child(struct run *run)
{
	struct run inner = block(run);
	pid_t child = fork();

	if (child == 0) {
		mark(&inner, NULL);
		run_commands(&inner);
		fflush(stdout);
		_exit(0);
	}
	wait_for(child);
}

static void exec_in_child(struct run *run)
{
	const char *file = next(run);
	pid_t child = fork();

	if (child == 0) {
		execl(file, file, (char *)NULL);
		_exit(127);
	}
	wait_for(child);
}

static void become(struct run *run)
{
	static char *arguments[MAX_WORDS + 1];
	int count = 0;

	while (run->at < run->end && count < MAX_WORDS)
		arguments[count++] = run->words[run->at++];
	arguments[count] = NULL;
	if (!count)
		fail("become what?");
	execv(arguments[0], arguments);
	fail("%s: %s", arguments[0], strerror(errno));
}

static void wait_ms(struct run *run, int spin)
{
	struct timespec start, now;
	long wanted_ms = (long)next_number(run);

	if (!spin) {
		usleep((useconds_t)wanted_ms * 1000);
		return;
	}
	clock_gettime(CLOCK_MONOTONIC, &start);
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 < wanted_ms);
}

static void pause_for_line(void)
{
	char byte;

	printf("paused\n");
	fflush(stdout);
	while (read(0, &byte, 1) == 1)
		if (byte == '\n')
			return;
	fail("standard input ended during a pause");
}

static void run_command(struct run *run, const char *command)
{
	if (!strcmp(command, "map") || !strcmp(command, "part"))
		add_mapping(run, *command == 'p');
	else if (!strcmp(command, "use"))
		run->current = (int)next_number(run);
	else if (!strcmp(command, "read") || !strcmp(command, "write"))
		touch(run, *command == 'w');
	else if (!strcmp(command, "unmap") || !strcmp(command, "protect") || !strcmp(command, "lock"))
		change_range(run, command);
	else if (!strcmp(command, "remap"))
		remap(run);
	else if (!strcmp(command, "advise"))
		advise(run);
	else if (!strcmp(command, "pwrite"))
		write_out(run);
	else if (!strcmp(command, "direct"))
		read_directly(run);
	else if (!strcmp(command, "repeat"))
		repeat(run);
	else if (!strcmp(command, "fork"))
		run_block_in_child(run);
	else if (!strcmp(command, "thread"))
		start_thread(run);
	else if (!strcmp(command, "join"))
		while (thread_count)
			pthread_join(threads[--thread_count], NULL);
	else if (!strcmp(command, "exec"))
		exec_in_child(run);
	else if (!strcmp(command, "become"))
		become(run);
	else if (!strcmp(command, "mark"))
		mark(run, next(run));
	else if (!strcmp(command, "pause"))
		pause_for_line();
	else if (!strcmp(command, "sleep") || !strcmp(command, "spin"))
		wait_ms(run, command[1] == 'p');
	else
		fail("unknown command %s", command);
}

static void run_commands(struct run *run)
{
	while (run->at < run->end)
		run_command(run, run->words[run->at++]);
}

static int read_words(char **words)
{
	char *text = NULL, *save = NULL;
	size_t size = 0;
	int count = 0;

	if (getdelim(&text, &size, '\0', stdin) < 0)
		return 0;
	for (char *word = strtok_r(text, " \t\n", &save); word; word = strtok_r(NULL, " \t\n", &save)) {
		if (count == MAX_WORDS)
			fail("more than %d words", MAX_WORDS);
		words[count++] = word;
	}
	return count;
}

int main(int argc, char **argv)
{
	static char *words[MAX_WORDS];
	struct run run = { .words = argv + 1, .end = argc - 1 };

	if (argc == 2 && !strcmp(argv[1], "-")) {
		run.words = words;
		run.end = read_words(words);
	}
	/* The first mark and print fault in what later ones need, so that they count nothing. */
	mark(&run, NULL);
	mark(&run, NULL);
	run_commands(&run);
	return 0;
}
