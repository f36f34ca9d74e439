/*
 * Exact mode: no page of the mount is mapped without a fault of its own.
 *
 * Loaded into a program with LD_PRELOAD by `xipfs run --exact`. Each mapping of a file on device
 * XIPFS_DEV ("MAJOR:MINOR") is registered with userfaultfd for asynchronous write protection (Linux
 * 6.7). Nothing is ever write-protected and nothing has to serve the descriptor: what counts is that
 * the kernel does no fault-around in a registered mapping (mm/memory.c, should_fault_around).
 *
 * Registered are: what is mapped when the constructor runs (first of all constructors: initfirst),
 * then each mmap and mremap, and everything again in each child of fork, which inherits none of it.
 * Then an madvise that no kernel knows tells the tracing daemon so, in order with the faults.
 *
 * Not registered, because the kernel refuses or nobody tells us: shared mappings of descriptors that
 * are open for reading only, system calls made without the C library. What dlopen maps is registered
 * when it has been relocated and its constructors have run, as with what the program was linked to.
 *
 * The registration ends with its descriptor. So the calls that close descriptors pass it by.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#if !defined(__LP64__)
#error "only for 64-bit systems: mmap's offset is passed as it is"
#endif

/* Newer than the headers of some distributions whose kernels have them. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define FEATURE_WP_ASYNC (1 << 15)
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef MREMAP_FIXED
#define MREMAP_FIXED 2
#endif
#define MADV_POPULATE_FOR_READING 22
#define MADV_POPULATE_FOR_WRITING 23

/* "xipf"; the daemon knows it as Registered (trace/syscalls.py). */
#define MADV_REGISTERED 0x78697066

static dev_t device;
static int uffd = -1;

static void *(*next_mmap)(void *, size_t, int, int, int, off_t);
static void *(*next_mremap)(void *, size_t, size_t, int, ...);
static void *(*next_dlopen)(const char *, int);
static int (*next_close)(int);
static int (*next_dup2)(int, int);
static int (*next_dup3)(int, int, int);

static void *find(void *already, const char *name)
{
	return already ? already : dlsym(RTLD_NEXT, name);
}

/* The descriptor lies high, where no program expects its next one, and ends with exec. */
static int high_up(int descriptor)
{
	struct rlimit limit;
	long from = 1000;

	if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < 1024)
		from = (long)limit.rlim_cur - 16;
	int moved = from > 2 ? fcntl(descriptor, F_DUPFD_CLOEXEC, (int)from) : -1;
	if (moved < 0)
		return descriptor;
	syscall(SYS_close, descriptor);
	return moved;
}

static int open_uffd(void)
{
	/* User mode only: then no privilege is needed. */
	int descriptor = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	struct uffdio_api api = { .api = UFFD_API, .features = FEATURE_WP_ASYNC };

	if (descriptor < 0)
		return -1;
	if (ioctl(descriptor, UFFDIO_API, &api) < 0) {
		syscall(SYS_close, descriptor);
		return -1;
	}
	return high_up(descriptor);
}

static void register_range(unsigned long start, unsigned long end)
{
	struct uffdio_register range = {
		.range = { .start = start, .len = end - start },
		.mode = UFFDIO_REGISTER_MODE_WP,
	};

	/* Refused (EPERM: not writable even by mprotect): it stays as it is, and is reported. */
	ioctl(uffd, UFFDIO_REGISTER, &range);
}

/* Register what one line of /proc/self/maps shows, if it is of the mount and meets [low, high). */
static void register_line(const char *line, unsigned long low, unsigned long high)
{
	char *at;
	unsigned long start = strtoul(line, &at, 16);
	unsigned long end = strtoul(at + 1, &at, 16);

	/* " r-xp OFFSET MAJOR:MINOR INODE PATH" */
	if (end <= low || start >= high || strlen(at) < 6)
		return;
	strtoul(at + 6, &at, 16);
	unsigned long major_number = strtoul(at, &at, 16);
	if (*at != ':')
		return;
	if (makedev(major_number, strtoul(at + 1, NULL, 16)) == device)
		register_range(start, end);
}

/* Register the mappings of the mount that are there and meet [low, high). */
static void register_present(unsigned long low, unsigned long high)
{
	char text[8192];
	size_t held = 0;
	ssize_t got;
	int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);

	if (maps < 0)
		return;
	while ((got = read(maps, text + held, sizeof(text) - 1 - held)) > 0) {
		char *line = text, *end;

		held += (size_t)got;
		text[held] = 0;
		while ((end = strchr(line, '\n'))) {
			*end = 0;
			register_line(line, low, high);
			line = end + 1;
		}
		held -= (size_t)(line - text);
		memmove(text, line, held);
	}
	syscall(SYS_close, maps);
}

static void register_all(void)
{
	uffd = open_uffd();
	if (uffd < 0)
		return;
	register_present(0, ULONG_MAX);
	/* EINVAL, always; it is the record that counts. */
	madvise(NULL, 0, MADV_REGISTERED);
}

static void in_child(void)
{
	int saved = errno;

	if (uffd >= 0)
		syscall(SYS_close, uffd);
	register_all();
	errno = saved;
}

__attribute__((constructor))
static void begin(int argc, char **argv, char **environment)
{
	const char *name = "XIPFS_DEV=";

	(void)argc;
	(void)argv;
	/* The C library's own constructor may not have run: environ is not set yet. */
	for (; environment && *environment; environment++) {
		char *at;

		if (strncmp(*environment, name, strlen(name)))
			continue;
		unsigned long major_number = strtoul(*environment + strlen(name), &at, 10);
		if (*at == ':')
			device = makedev(major_number, strtoul(at + 1, NULL, 10));
	}
	if (!device)
		return;
	pthread_atfork(NULL, NULL, in_child);
	register_all();
}

static int is_on_mount(int descriptor)
{
	struct stat status;

	return fstat(descriptor, &status) == 0 && status.st_dev == device;
}

static void *map(void *address, size_t length, int prot, int flags, int descriptor, off_t offset)
{
	int saved = errno;

	next_mmap = find(next_mmap, "mmap");
	if (uffd < 0 || flags & MAP_ANONYMOUS || !is_on_mount(descriptor)) {
		errno = saved;
		return next_mmap(address, length, prot, flags, descriptor, offset);
	}
	/* Populated before it is registered, it would be with fault-around. */
	int populate = flags & MAP_POPULATE && !(flags & (MAP_NONBLOCK | MAP_LOCKED));
	errno = saved;
	void *base = next_mmap(address, length, prot, populate ? flags & ~MAP_POPULATE : flags,
			       descriptor, offset);
	if (base == MAP_FAILED)
		return base;
	unsigned long page = (unsigned long)sysconf(_SC_PAGESIZE) - 1;
	register_range((unsigned long)base, ((unsigned long)base + length + page) & ~page);
	if (populate) {
		int writing = prot & PROT_WRITE && (flags & MAP_TYPE) == MAP_PRIVATE;
		madvise(base, length, writing ? MADV_POPULATE_FOR_WRITING : MADV_POPULATE_FOR_READING);
	}
	errno = saved;
	return base;
}

void *mmap(void *address, size_t length, int prot, int flags, int descriptor, off_t offset)
{
	return map(address, length, prot, flags, descriptor, offset);
}

void *mmap64(void *address, size_t length, int prot, int flags, int descriptor, off64_t offset)
{
	return map(address, length, prot, flags, descriptor, offset);
}

/* mremap takes a mapping's registration away. */
void *mremap(void *old, size_t old_length, size_t length, int flags, ...)
{
	va_list arguments;

	va_start(arguments, flags);
	void *wanted = flags & MREMAP_FIXED ? va_arg(arguments, void *) : NULL;
	va_end(arguments);
	next_mremap = find(next_mremap, "mremap");
	void *base = next_mremap(old, old_length, length, flags, wanted);
	if (base == MAP_FAILED || uffd < 0)
		return base;
	int saved = errno;
	register_present((unsigned long)base, (unsigned long)base + length);
	/* With MREMAP_DONTUNMAP the old range is still mapped. */
	register_present((unsigned long)old, (unsigned long)old + old_length);
	errno = saved;
	return base;
}

/*
 * dlopen searches by the path that its caller was linked with, and takes us for the caller. So only
 * calls that search nowhere, or whose caller has no path of its own, come through here; the others
 * are passed on by a jump, as the compiler makes of a call in last place.
 */
static int searches_by_caller(const char *file, void *caller)
{
	Dl_info info;
	struct link_map *map = NULL;

	if (!file || (strchr(file, '/') && !strchr(file, '$')))
		return 0;
	if (!dladdr1(caller, &info, (void **)&map, RTLD_DL_LINKMAP) || !map)
		return 1;
	for (ElfW(Dyn) *entry = map->l_ld; entry && entry->d_tag != DT_NULL; entry++)
		if (entry->d_tag == DT_RPATH || entry->d_tag == DT_RUNPATH)
			return 1;
	return strchr(file, '$') != NULL;
}

void *dlopen(const char *file, int mode)
{
	next_dlopen = find(next_dlopen, "dlopen");
	if (uffd < 0 || searches_by_caller(file, __builtin_return_address(0)))
		return next_dlopen(file, mode);
	void *handle = next_dlopen(file, mode);
	int saved = errno;

	if (handle && !(mode & RTLD_NOLOAD))
		register_present(0, ULONG_MAX);
	errno = saved;
	return handle;
}

int close(int descriptor)
{
	if (descriptor >= 0 && descriptor == uffd) {
		errno = EBADF;
		return -1;
	}
	next_close = find(next_close, "close");
	return next_close(descriptor);
}

int close_range(unsigned int first, unsigned int last, int flags)
{
	unsigned int ours = (unsigned int)uffd;

	if (first > last || uffd < 0 || ours < first || ours > last)
		return (int)syscall(SYS_close_range, first, last, flags);
	if (ours > first && syscall(SYS_close_range, first, ours - 1, flags) < 0)
		return -1;
	if (ours < last && syscall(SYS_close_range, ours + 1, last, flags) < 0)
		return -1;
	return 0;
}

void closefrom(int first)
{
	close_range(first < 0 ? 0 : (unsigned int)first, UINT_MAX, 0);
}

/* Leave the number to the program that wants it. */
static void make_way(int wanted)
{
	int saved = errno;

	if (wanted >= 0 && wanted == uffd) {
		int moved = fcntl(uffd, F_DUPFD_CLOEXEC, wanted + 1);
		uffd = moved >= 0 ? moved : fcntl(uffd, F_DUPFD_CLOEXEC, 3);
	}
	errno = saved;
}

int dup2(int descriptor, int wanted)
{
	make_way(wanted);
	next_dup2 = find(next_dup2, "dup2");
	return next_dup2(descriptor, wanted);
}

int dup3(int descriptor, int wanted, int flags)
{
	make_way(wanted);
	next_dup3 = find(next_dup3, "dup3");
	return next_dup3(descriptor, wanted, flags);
}
