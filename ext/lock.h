/* A lock that needs no making and no end. */
#ifndef BN_LOCK_H
#define BN_LOCK_H

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
typedef SRWLOCK bn_lock;
#define BN_LOCK_INIT SRWLOCK_INIT
#define bn_lock_take AcquireSRWLockExclusive
#define bn_lock_give ReleaseSRWLockExclusive
#else
#include <pthread.h>
typedef pthread_mutex_t bn_lock;
#define BN_LOCK_INIT PTHREAD_MUTEX_INITIALIZER
#define bn_lock_take (void)pthread_mutex_lock
#define bn_lock_give (void)pthread_mutex_unlock
#endif

#endif
