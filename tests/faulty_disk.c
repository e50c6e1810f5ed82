/* A disk that fails: from the n-th change under a folder on, every change is refused with an error of choice, or one
   signal is raised. It stands before libc (LD_PRELOAD), so it is met by Python, Rust and C alike.

   cc -shared -fPIC -o faulty_disk.so faulty_disk.c -ldl */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char under[4096];
static long first, seen;
static int refusal, blow;

/* Changes are counted from now on. From the n-th on (n < 0: at it alone; 0: never) they are refused with `error`; or
   `sent` is raised just before it. */
void faulty_disk(const char *folder, long nth, int error, int sent) {
    strncpy(under, folder, sizeof under - 1);
    first = nth, refusal = error, blow = sent, seen = 0;
}

long faulty_disk_seen(void) { return seen; }

static int fails(const char *path) {
    if (!*under || strncmp(path, under, strlen(under))) return 0;
    seen++;
    if (first < 0 ? seen != -first : !first || seen < first) return 0;
    if (blow && seen == first) raise(blow);
    if (refusal) errno = refusal;
    return refusal;
}

static int fails_at(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}

#define CHANGE(type, name, parameters, arguments, failing)                                                            \
    type name parameters {                                                                                            \
        type(*real) parameters = dlsym(RTLD_NEXT, #name);                                                             \
        return failing ? -1 : real arguments;                                                                         \
    }

CHANGE(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), fails_at(fd))
CHANGE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), fails_at(fd))
CHANGE(ssize_t, sendfile64, (int to, int from, off64_t *at, size_t size), (to, from, at, size), fails_at(to))
CHANGE(ssize_t, sendfile, (int to, int from, off_t *at, size_t size), (to, from, at, size), fails_at(to))
CHANGE(int, ftruncate64, (int fd, off64_t size), (fd, size), fails_at(fd))
CHANGE(int, fsync, (int fd), (fd), fails_at(fd))
CHANGE(int, mkdir, (const char *path, mode_t mode), (path, mode), fails(path))
CHANGE(int, rename, (const char *from, const char *to), (from, to), fails(to))

#define OPEN(name)                                                                                                    \
    int name(const char *path, int flags, ...) {                                                                      \
        va_list rest;                                                                                                 \
        va_start(rest, flags);                                                                                        \
        mode_t mode = va_arg(rest, mode_t);                                                                           \
        va_end(rest);                                                                                                 \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);                                                \
        return (flags & O_CREAT) && fails(path) ? -1 : real(path, flags, mode);                                       \
    }

OPEN(open)
OPEN(open64)
