/* The OpenMP team of the calling thread: the cores of its threads, and their sleep while there is no work. */

#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Binds thread i of the team to the `num_each` cores from number `i * num_each` of `cores` on. */
void place_team(const int32_t *cores, int num_cores, int num_each) {
#pragma omp parallel
    {
        cpu_set_t set;
        CPU_ZERO(&set);
        for (int i = 0; i < num_each; i++)
            CPU_SET(cores[(omp_get_thread_num() * num_each + i) % num_cores], &set);
        sched_setaffinity(0, sizeof set, &set);
    }
}

/* Calls `wait` on the calling thread. The other threads of its team sleep meanwhile, where OpenMP would have them spin
   for some ms. All are awake when it returns. */
void wait_as_team(void (*wait)(void)) {
    int is_over = 0;
#pragma omp parallel
    {
        if (omp_get_thread_num() == 0) {
            wait();
            __atomic_store_n(&is_over, 1, __ATOMIC_RELEASE);
            syscall(SYS_futex, &is_over, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
        } else {
            while (!__atomic_load_n(&is_over, __ATOMIC_ACQUIRE))
                syscall(SYS_futex, &is_over, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
        }
    }
}
