/* Lets the programs of one host see a wrong wall clock: BESSEMER_CLOCK seconds ahead. Loaded by LD_PRELOAD.
 *
 * Only CLOCK_REALTIME is off, as where nobody set the time: monotonic clocks and the times of files are right. Calls that
 * wait until a moment of CLOCK_REALTIME get the moment that the kernel's clock will show then.
 *
 *     cc -shared -fPIC -O2 -o clock.so clock.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

static time_t ahead;

__attribute__((constructor)) static void read_ahead(void) {
    const char *text = getenv("BESSEMER_CLOCK");
    ahead = text ? atol(text) : 0;
}

/* The function that this one stands in front of. */
#define NEXT(name)                                              \
    static __typeof__(&name) next;                              \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int shows_wall_time(clockid_t clock) {
    return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE;
}

/* What people see. */

int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT(clock_gettime);
    int failed = next(clock, now);
    if (!failed && shows_wall_time(clock)) now->tv_sec += ahead;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    NEXT(gettimeofday);
    int failed = next(now, zone);
    if (!failed && now) now->tv_sec += ahead;
    return failed;
}

time_t time(time_t *now) {
    struct timespec seen;
    clock_gettime(CLOCK_REALTIME, &seen);
    if (now) *now = seen.tv_sec;
    return seen.tv_sec;
}

int timespec_get(struct timespec *now, int base) {
    NEXT(timespec_get);
    int done = next(now, base);
    if (done == TIME_UTC) now->tv_sec += ahead;
    return done;
}

/* What they wait for. A moment before 2001 is one of a monotonic clock, which counts from when the machine started. */

static const struct timespec *by_the_kernel(const struct timespec *moment, struct timespec *room) {
    if (!moment || moment->tv_sec < 1000000000) return moment;
    *room = *moment;
    room->tv_sec -= ahead;
    return room;
}

/* Of the versions that glibc has of this one, dlsym would find the oldest. */
int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static __typeof__(&pthread_cond_timedwait) next;
    struct timespec room;
    if (!next) next = (__typeof__(next))dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!next) next = (__typeof__(next))dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    return next(cond, mutex, by_the_kernel(until, &room));
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    NEXT(pthread_mutex_timedlock);
    struct timespec room;
    return next(mutex, by_the_kernel(until, &room));
}

int pthread_rwlock_timedrdlock(pthread_rwlock_t *restrict lock, const struct timespec *restrict until) {
    NEXT(pthread_rwlock_timedrdlock);
    struct timespec room;
    return next(lock, by_the_kernel(until, &room));
}

int pthread_rwlock_timedwrlock(pthread_rwlock_t *restrict lock, const struct timespec *restrict until) {
    NEXT(pthread_rwlock_timedwrlock);
    struct timespec room;
    return next(lock, by_the_kernel(until, &room));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    NEXT(sem_timedwait);
    struct timespec room;
    return next(semaphore, by_the_kernel(until, &room));
}

#if __GLIBC_PREREQ(2, 30)
int pthread_cond_clockwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex, clockid_t clock,
                           const struct timespec *restrict until) {
    NEXT(pthread_cond_clockwait);
    struct timespec room;
    return next(cond, mutex, clock, shows_wall_time(clock) ? by_the_kernel(until, &room) : until);
}

int sem_clockwait(sem_t *restrict semaphore, clockid_t clock, const struct timespec *restrict until) {
    NEXT(sem_clockwait);
    struct timespec room;
    return next(semaphore, clock, shows_wall_time(clock) ? by_the_kernel(until, &room) : until);
}
#endif

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    NEXT(clock_nanosleep);
    struct timespec room;
    int shift = (flags & TIMER_ABSTIME) && shows_wall_time(clock);
    return next(clock, flags, shift ? by_the_kernel(until, &room) : until, left);
}

/* Locks of Abseil, which Ray and gRPC wait on, call the kernel by its number. */
long syscall(long number, ...) {
    static long (*next)(long, ...);
    struct timespec room;
    long word[6];
    va_list words;
    if (!next) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    va_start(words, number);
    for (int i = 0; i < 6; i++) word[i] = va_arg(words, long);
    va_end(words);
    if (number == SYS_futex && (word[1] & FUTEX_CLOCK_REALTIME) && (word[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET)
        word[3] = (long)by_the_kernel((const struct timespec *)word[3], &room);
    long done = next(number, word[0], word[1], word[2], word[3], word[4], word[5]);
    if (!done && number == SYS_clock_gettime && shows_wall_time((clockid_t)word[0]))
        ((struct timespec *)word[1])->tv_sec += ahead;
    return done;
}
