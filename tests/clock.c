/* A clock of its own for a machine: preloaded into its processes, it moves the time of day by the seconds that the first
   eight bytes of the file CLOCK_OFFSET hold (a double), at once when they change. What counts from the start of the
   computer (CLOCK_MONOTONIC) stays, and so does how long anybody waits: a moment of the moved clock until which somebody
   wants to wait is handed to the kernel as its own. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define TIME_OF_DAY 1000000000 /* seconds; a computer that runs for 30 years is not expected */

static double none = 0.0;
static volatile double *offset = &none;

__attribute__((constructor)) static void look(void) {
    const char *path = getenv("CLOCK_OFFSET");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *seen = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
    if (seen != MAP_FAILED) offset = seen;
    if (file >= 0) close(file);
}

static struct timespec moved(struct timespec at, double by) {
    double whole = floor(by);
    at.tv_sec += (time_t)whole;
    at.tv_nsec += (long)((by - whole) * 1e9);
    if (at.tv_nsec >= 1000000000) at.tv_sec += 1, at.tv_nsec -= 1000000000;
    return at;
}

/* The kernel's moment of one that a caller has read from the moved clock; others are left alone. */
static const struct timespec *real(const struct timespec *at, struct timespec *room) {
    if (at == NULL || at->tv_sec < TIME_OF_DAY || *offset == 0.0) return at;
    *room = moved(*at, -*offset);
    return room;
}

static int of_day(clockid_t clock) {
    return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_TAI;
}

static void *find(const char *name, const char *version) {
    void *found = version ? dlvsym(RTLD_NEXT, name, version) : NULL;
    return found ? found : dlsym(RTLD_NEXT, name); /* other processors have one version of each */
}

/* `next`: the function of the C library that bears the name; some have an older one of the same name beside it. */
#define NEXT(name, version) \
    static __typeof__(name) *next; \
    if (next == NULL) next = (__typeof__(name) *)find(#name, version)

/* --- reading it ----------------------------------------------------------------------------------------------------- */
int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT(clock_gettime, NULL);
    int failed = next(clock, now);
    if (!failed && of_day(clock)) *now = moved(*now, *offset);
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec read;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &read);
    now->tv_sec = read.tv_sec;
    now->tv_usec = read.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *to) {
    struct timespec read;
    clock_gettime(CLOCK_REALTIME, &read);
    if (to) *to = read.tv_sec;
    return read.tv_sec;
}

int timespec_get(struct timespec *now, int base) {
    return base == TIME_UTC && clock_gettime(CLOCK_REALTIME, now) == 0 ? base : 0;
}

/* --- waiting until a moment of it ----------------------------------------------------------------------------------- */
int pthread_cond_timedwait(pthread_cond_t *restrict it, pthread_mutex_t *restrict lock, const struct timespec *restrict at) {
    NEXT(pthread_cond_timedwait, "GLIBC_2.3.2");
    struct timespec room;
    return next(it, lock, real(at, &room));
}

int pthread_cond_clockwait(pthread_cond_t *restrict it, pthread_mutex_t *restrict lock, clockid_t clock,
                           const struct timespec *restrict at) {
    NEXT(pthread_cond_clockwait, NULL);
    struct timespec room;
    return next(it, lock, clock, real(at, &room));
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict lock, const struct timespec *restrict at) {
    NEXT(pthread_mutex_timedlock, NULL);
    struct timespec room;
    return next(lock, real(at, &room));
}

int sem_timedwait(sem_t *restrict it, const struct timespec *restrict at) {
    NEXT(sem_timedwait, NULL);
    struct timespec room;
    return next(it, real(at, &room));
}

int sem_clockwait(sem_t *restrict it, clockid_t clock, const struct timespec *restrict at) {
    NEXT(sem_clockwait, NULL);
    struct timespec room;
    return next(it, clock, real(at, &room));
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *at, struct timespec *left) {
    NEXT(clock_nanosleep, "GLIBC_2.17");
    struct timespec room;
    return next(clock, flags, flags & TIMER_ABSTIME ? real(at, &room) : at, left);
}

int timerfd_settime(int file, int flags, const struct itimerspec *at, struct itimerspec *before) {
    NEXT(timerfd_settime, NULL);
    struct itimerspec asked = *at;
    struct timespec room;
    if (flags & TFD_TIMER_ABSTIME) asked.it_value = *real(&at->it_value, &room);
    return next(file, flags, &asked, before);
}

long syscall(long number, ...) {
    NEXT(syscall, NULL);
    long a[6];
    struct timespec room;
    va_list more;
    va_start(more, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(more, long);
    va_end(more);
    if (number == SYS_futex && a[1] & FUTEX_CLOCK_REALTIME) a[3] = (long)real((const struct timespec *)a[3], &room);
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
