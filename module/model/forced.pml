/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of a forced write, of what comes upon its sectors, and of suspends without flush.
 *
 * Checked properties
 *
 *   order      A forced write is never written over a write to the same sectors that came after it,
 *              however often a suspend gives it back and it is written again.
 *   durable    It ends when it is written, and committed after that.
 *   none lost  Both writes end.
 *
 * Each step names the function of module/ that it stands for. What is held together by dev->lock
 * is one atomic step; a write is in flight between two of them.
 *
 * Abstracted: what the core was given back it brings again in any order; order.pml has its list.
 * A write that the module sees for the first time while the core has the other one still has no
 * order against it, as there. Both writes are to one block, something is uncommitted throughout,
 * and a commit takes one step.
 *
 * Variants that must fail
 *
 *   NO_WAIT    the second write does not wait for the first to end
 *   END_EARLY  it waits until the first is written, not until that has ended
 *   NO_NOTE    what a suspend gives back has no order
 *   PASS_ON    a forced write that comes again goes to its device as it is, which lets others pass
 */
#ifndef ROUNDS
#define ROUNDS 3		/* suspends */
#endif

#define FIRST 1			/* the forced write */
#define SECOND 2

mtype = { NEW, FLYING, FORCED, WAITING, DEFERRED, BACK, TURN, DONE };
mtype at[3] = NEW;

byte medium;			/* who has written the sectors last */
bool forcing;			/* dev->forced has the first */
bool noted[3];
bool requeue, written;
bool again, passed;		/* the first has come before; goes as it is */
byte rounds;

/* dmu_give_back(), and dmu_end_io() of a forced one */
inline give_back(r)
{
	at[r] = BACK;
#ifndef NO_NOTE
	noted[r] = true;
#endif
	if
	:: r == FIRST -> forcing = false
	:: else
	fi
}

/* dmu_map(), dmu_hold(), dmu_returned_send(); under the lock */
inline come(r)
{
	noted[r] = false;
	if
	:: requeue -> give_back(r)
	:: else ->
		if
		:: r == FIRST ->
			/* dmu_force() */
			forcing = true;
#ifdef PASS_ON
			if
			:: again -> forcing = false; passed = true
			:: else
			fi;
#endif
			written = false;
			again = true;
			at[FIRST] = FLYING
#ifndef NO_WAIT
		:: r == SECOND && forcing -> at[SECOND] = DEFERRED
#endif
		:: else -> at[SECOND] = FLYING
		fi
	fi
}

/* A write reaches the medium. */
inline land(r)
{
	assert(r == SECOND || medium != SECOND);	/* order */
	medium = r;
	if
	:: r == FIRST -> written = true
	:: else
	fi
}

active proctype writes()
{
	/* The second is sent when the first has come. */
	atomic { come(FIRST) };
	atomic { at[FIRST] != BACK -> come(SECOND) }
}

active proctype device()
{
end:	do
	:: atomic { at[FIRST] == FLYING ->
		land(FIRST);
#ifdef END_EARLY
		forcing = false;
#endif
		/* dmu_end_io(), dmu_flush_join() */
		if
		:: passed -> at[FIRST] = DONE
		:: !passed && requeue -> give_back(FIRST)
		:: else -> at[FIRST] = FORCED
		fi }
	:: atomic { at[SECOND] == FLYING -> land(SECOND); at[SECOND] = DONE }
	od
}

/* dmu_flush_answer(), dmu_forced_end(), dmu_deferred() */
active proctype commits()
{
end:	do
	:: atomic { at[FIRST] == FORCED && !requeue ->
		assert(written);			/* durable */
		at[FIRST] = DONE;
		forcing = false }
	:: atomic { at[SECOND] == DEFERRED && !forcing && !requeue -> come(SECOND) }
	od
}

active proctype suspends()
{
	do
	:: rounds == ROUNDS -> break
	:: rounds < ROUNDS ->
		/* dmu_requeue_all() */
		atomic {
			rounds++;
			requeue = true;
			if
			:: at[FIRST] == FORCED -> give_back(FIRST)
			:: else
			fi;
			if
			:: at[SECOND] == DEFERRED || at[SECOND] == TURN -> give_back(SECOND)
			:: else
			fi
		}
		/* The core waits for what is in flight. */
		atomic { at[FIRST] != FLYING && at[SECOND] != FLYING -> requeue = false }
		/* dmu_returned_again() */
		do
		:: atomic { at[FIRST] == BACK -> come(FIRST) }
		:: atomic { at[SECOND] == BACK && !noted[FIRST] -> come(SECOND) }
		:: atomic { at[SECOND] == BACK && noted[FIRST] -> at[SECOND] = TURN }
		:: atomic { at[SECOND] == TURN && !noted[FIRST] -> come(SECOND) }
		:: at[FIRST] != BACK && at[SECOND] != BACK && at[SECOND] != TURN -> break
		od
	od;
	/* none lost */
	at[FIRST] == DONE && at[SECOND] == DONE;
	assert(medium == SECOND)
}
