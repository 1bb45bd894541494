// SPDX-License-Identifier: GPL-2.0-only
/*
 * Stop points, in debug builds only (make DMU_STOP_POINTS=y); see dmu-stop.h.
 *
 *   /sys/module/dm_userspace/parameters/stop     write "hold NAME [COUNT [SKIP]]": the next COUNT
 *                                                threads (1) that come to the point after SKIP
 *                                                others (0) stay there;
 *                                                "release NAME": they go on, and nobody is held;
 *                                                "release": so at every point.
 *                                                read: a line "NAME WAITING PASSED" for each
 *   .../stop_delay                               who passes a point is delayed by chance, up to so
 *                                                many microseconds; 0, as at first: not
 *   .../stop_every                               one of so many passes is
 *
 * A thread that may sleep does; another one spins with whatever it holds. Nobody stays longer than
 * twenty seconds, and who does is in the kernel's log.
 */
#include <linux/delay.h>
#include <linux/kernel.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/preempt.h>
#include <linux/random.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include "dmu-core.h"

#define DMU_STOP_MOST	(20ULL * NSEC_PER_SEC)
#define DMU_SPIN_MOST	50	/* microseconds of a delay with interrupts off */

static const char * const dmu_stop_names[DMU_STOPS] = {
	[DMU_STOP_LOOKED] = "looked",
	[DMU_STOP_SEARCHING] = "searching",
	[DMU_STOP_HOLDING] = "holding",
	[DMU_STOP_RETURNING] = "returning",
	[DMU_STOP_CLAIMED] = "claimed",
	[DMU_STOP_POPPED] = "popped",
	[DMU_STOP_ANSWERING] = "answering",
	[DMU_STOP_READING] = "reading",
	[DMU_STOP_COLLECTED] = "collected",
	[DMU_STOP_SUSPENDING] = "suspending",
	[DMU_STOP_UNDOING] = "undoing",
	[DMU_STOP_LISTED] = "listed",
	[DMU_STOP_WRITING] = "writing",
	[DMU_STOP_WRITTEN] = "written",
	[DMU_STOP_FORGOTTEN] = "forgotten",
	[DMU_STOP_DROPPED] = "dropped",
	[DMU_STOP_ENDED] = "ended",
	[DMU_STOP_SCATTERED] = "scattered",
	[DMU_STOP_GRANTING] = "granting",
	[DMU_STOP_TOUCHING] = "touching",
	[DMU_STOP_MISSED] = "missed",
	[DMU_STOP_TOUCHED] = "touched",
	[DMU_STOP_FLUSHING] = "flushing",
	[DMU_STOP_TURNING] = "turning",
	[DMU_STOP_OPENING] = "opening",
	[DMU_STOP_CLOSING] = "closing",
	[DMU_STOP_HIDDEN] = "hidden",
};

static struct dmu_stop_point {
	unsigned int hold;		/* so many are to stay */
	unsigned int skip;		/* after so many */
	unsigned int released;		/* how often */
	atomic_t waiting;
	atomic_t passed;
} dmu_stop_points[DMU_STOPS];

static DEFINE_RAW_SPINLOCK(dmu_stop_lock);	/* hold, released */

static unsigned int dmu_stop_delay;
module_param_named(stop_delay, dmu_stop_delay, uint, 0600);
MODULE_PARM_DESC(stop_delay, "the longest random delay at a stop point, in microseconds");

static unsigned int dmu_stop_every = 4;
module_param_named(stop_every, dmu_stop_every, uint, 0600);
MODULE_PARM_DESC(stop_every, "one of so many passes of a stop point is delayed");

static bool dmu_stop_sleeps(void)
{
	return preemptible() && !rcu_preempt_depth();
}

static void dmu_stop_stay(struct dmu_stop_point *point, unsigned int released,
			  enum dmu_stop at)
{
	u64 until = ktime_get_mono_fast_ns() + DMU_STOP_MOST;

	while (READ_ONCE(point->released) == released) {
		if (ktime_get_mono_fast_ns() > until) {
			pr_warn("dmu: nobody has released the stop point %s\n",
				dmu_stop_names[at]);
			break;
		}
		if (dmu_stop_sleeps())
			usleep_range(200, 500);
		else
			cpu_relax();
	}
	atomic_dec(&point->waiting);
}

static void dmu_stop_delayed(unsigned int most)
{
	unsigned int every = READ_ONCE(dmu_stop_every), chance = get_random_u32();

	if (every > 1 && chance % every)
		return;
	chance = (chance >> 8) % most + 1;
	if (dmu_stop_sleeps()) {
		usleep_range(chance, chance + 10);
		return;
	}
	if (irqs_disabled())
		chance = min_t(unsigned int, chance, DMU_SPIN_MOST);
	/* Not in one piece: udelay() takes no more than some milliseconds. */
	for (; chance > 100; chance -= 100)
		udelay(100);
	udelay(chance);
}

void dmu_stop(enum dmu_stop at)
{
	struct dmu_stop_point *point = &dmu_stop_points[at];
	unsigned int most = READ_ONCE(dmu_stop_delay), released = 0;
	unsigned long flags;
	bool stay = false;

	if (READ_ONCE(point->hold)) {
		raw_spin_lock_irqsave(&dmu_stop_lock, flags);
		stay = point->hold && !point->skip;
		if (point->skip) {
			point->skip--;
		} else if (stay) {
			point->hold--;
			atomic_inc(&point->waiting);
		}
		released = point->released;
		raw_spin_unlock_irqrestore(&dmu_stop_lock, flags);
	}
	if (stay)
		dmu_stop_stay(point, released, at);
	else if (most)
		dmu_stop_delayed(most);
	atomic_inc(&point->passed);
}

static void dmu_stop_release(struct dmu_stop_point *point)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&dmu_stop_lock, flags);
	point->hold = 0;
	point->skip = 0;
	WRITE_ONCE(point->released, point->released + 1);
	atomic_set(&point->passed, 0);
	raw_spin_unlock_irqrestore(&dmu_stop_lock, flags);
}

static void dmu_stop_hold(struct dmu_stop_point *point, unsigned int count, unsigned int skip)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&dmu_stop_lock, flags);
	point->skip = skip;
	WRITE_ONCE(point->hold, count);
	raw_spin_unlock_irqrestore(&dmu_stop_lock, flags);
}

static int dmu_stop_set(const char *value, const struct kernel_param *param)
{
	char verb[8] = "", name[16] = "";
	unsigned int count = 1, skip = 0, i;
	bool known = false;

	if (sscanf(value, "%7s %15s %u %u", verb, name, &count, &skip) < 1)
		return -EINVAL;
	for (i = 0; i < DMU_STOPS; i++) {
		if (*name && strcmp(name, dmu_stop_names[i]))
			continue;
		known = true;
		if (!strcmp(verb, "release"))
			dmu_stop_release(&dmu_stop_points[i]);
		else if (!strcmp(verb, "hold") && *name)
			dmu_stop_hold(&dmu_stop_points[i], count, skip);
		else
			known = false;
	}
	return known ? 0 : -EINVAL;
}

static int dmu_stop_get(char *buffer, const struct kernel_param *param)
{
	unsigned int i;
	int size = 0;

	for (i = 0; i < DMU_STOPS; i++)
		size += scnprintf(buffer + size, PAGE_SIZE - size, "%s %d %d\n",
				  dmu_stop_names[i],
				  atomic_read(&dmu_stop_points[i].waiting),
				  atomic_read(&dmu_stop_points[i].passed));
	return size;
}

static const struct kernel_param_ops dmu_stop_ops = {
	.set = dmu_stop_set,
	.get = dmu_stop_get,
};

module_param_cb(stop, &dmu_stop_ops, NULL, 0600);
MODULE_PARM_DESC(stop, "what is held at which stop point");
