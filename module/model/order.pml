/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of the order of requests to one block over suspends without flush.
 *
 * Checked properties
 *
 *   order      Requests that came before the end of a suspend are served in the order in which
 *              they had come (docs/target.md, rule 2), although the device-mapper core puts
 *              what it is given back at the head of its own list, and brings it again from there.
 *   none lost  Every request is served.
 *
 * Each step names the function of module/, or of the core (dm.c), that it stands for. What is held
 * together by dev->lock is one atomic step.
 *
 * Abstracted: the cell is a queue whose head the worker lets go at any time; what else happens to
 * cells is cell.pml. Notes never expire and memory for them is there. A request that the
 * module sees for the first time after the resume has no order against those that the core has
 * still to bring again: the core lets it pass, whatever the target does.
 *
 * Variants that must fail
 *
 *   NO_NOTES   nothing is noted: what comes between dmu_presuspend() and the end of the core's own
 *              part is given back later, and comes again earlier
 *   NO_TURN    what comes again does not wait for those before it
 *   NOTE_LAST  only what comes during the suspend is noted, not what waited before
 *   NEW_STAMP  a request that goes back once more is noted as if it had come just then
 */
#define MOST 3			/* requests, submitted one after the other */
#ifndef ROUNDS
#define ROUNDS 2		/* suspends */
#endif

/* The core. */
chan list = [MOST] of { byte };	/* md->deferred */
bool noflush, blocked;		/* DMF_NOFLUSH_SUSPENDING, DMF_BLOCK_IO_FOR_SUSPEND */
byte mapping;			/* requests within dm_submit_bio() */
bool resumed;

/* dmu_device, dmu_returned, dmu_note */
chan cell = [MOST] of { byte };
bool requeue;
byte arrivals, arrival[MOST + 1];
byte noted, waits;		/* sets of requests: with a note, come again and waiting */

/* What the property is about: sets of requests. */
byte come, served, queued;
byte before[MOST + 1];

#define bit_of(r)     (1 << r)
#define requeueing    (requeue && noflush)
#define earlier(a, b) ((noted & bit_of(a)) && arrival[a] < arrival[b])
#define first(r)      (!earlier(1, r) && !earlier(2, r) && !earlier(3, r))

/* dm_handle_requeue(): to the head of the core's list */
inline core_head(r)
{
	d_step {
		list!r;
		n = len(list) - 1;
		do
		:: n > 0 -> list?x; list!x; n--
		:: else -> break
		od;
		x = 0
	}
}

/* dmu_returned_stamp(); dev->lock is held. */
inline stamp(r)
{
	if
#ifdef NEW_STAMP
	:: arrivals < 250 -> arrivals++; arrival[r] = arrivals
#else
	:: !arrival[r] -> arrivals++; arrival[r] = arrivals
#endif
	:: else
	fi;
	if
	:: !(come & bit_of(r)) ->
		come = come | bit_of(r);
		before[r] = come & ~served & ~bit_of(r);
		if
		:: !requeue -> before[r] = before[r] & queued
		:: else
		fi
	:: else
	fi
}

/* dmu_returned_note() */
inline note(r)
{
#ifndef NO_NOTES
	d_step {
		if
		:: requeue && !(noted & bit_of(r)) -> noted = noted | bit_of(r)
		:: else
		fi
	}
#endif
	skip
}

/* dmu_hold(), else dmu_give_back() or DM_MAPIO_REQUEUE */
inline hold(r)
{
	atomic {
		stamp(r);
		if
		:: requeueing -> back = true
		:: else -> back = false; cell!r; queued = queued | bit_of(r)
		fi
	};
	if
	:: back ->
		note(r);
		core_head(r)
	:: else
	fi;
	back = false
}

/* dmu_returned_turn(), one at a time: a request that waits for nobody any more. */
inline ready(r)
{
	if
#ifdef NO_TURN
	:: d_step { waits & bit_of(r) ->
#else
	:: d_step { (waits & bit_of(r)) && first(r) ->
#endif
		waits = waits & ~bit_of(r);
		noted = noted & ~bit_of(r);
		sent = r
	   }
	:: else
	fi
}

/* dmu_map(): dmu_returned_again(), dmu_returned_send(), dmu_map_held() */
inline map(r)
{
	if
	:: atomic { (noted & bit_of(r)) && requeueing -> skip };
	   core_head(r)
	:: atomic {
		(noted & bit_of(r)) && !requeueing ->
		waits = waits | bit_of(r);
		todo = 0;
		do
		:: sent = 0;
		   ready(1);
		   if
		   :: !sent -> ready(2)
		   :: else
		   fi;
		   if
		   :: !sent -> ready(3)
		   :: else
		   fi;
		   if
		   :: sent -> queue[todo] = sent; todo++
		   :: else -> break
		   fi
		od;
		done = 0
	   };
	   do
	   :: done < todo -> hold(queue[done]); queue[done] = 0; done++
	   :: else -> break
	   od;
	   atomic { done = 0; todo = 0; sent = 0 }
	:: atomic { !(noted & bit_of(r)) -> arrival[r] = 0 };
	   hold(r)
	fi
}

/* dm_submit_bio() */
active proctype submit()
{
	byte r = 1, x, n, sent, todo, done;
	byte queue[MOST];
	bool back;

	do
	:: r <= MOST ->
		if
		:: d_step { blocked -> list!r }
		:: d_step { !blocked -> mapping++ };
		   map(r);
		   mapping--
		fi;
		r++
	:: else -> break
	od
}

/* dm_wq_work() */
active proctype core_work()
{
	byte r, x, n, sent, todo, done;
	byte queue[MOST];
	bool back;

end:	do
	:: d_step { resumed && !blocked && len(list) > 0 -> list?r; mapping++ };
	   map(r);
	   d_step { mapping--; r = 0 }
	od
}

/* __dm_suspend(), dmu_presuspend(), dm_resume(), dmu_go_on() */
active proctype suspend()
{
	byte rounds, x, n, r;
	byte queue[MOST];
	byte count;

	do
	:: rounds < ROUNDS ->
		rounds++;
		noflush = true;
		/* dmu_requeue_all() */
		d_step {
			requeue = true;
			do
			:: len(cell) > 0 -> cell?x; queue[count] = x; count++
			:: else -> break
			od;
			/* dmu_returned_collect() */
			r = 1;
			do
			:: r <= MOST ->
				if
				:: waits & bit_of(r) -> queue[count] = r; count++
				:: else
				fi;
				r++
			:: else -> break
			od;
			r = 0;
			x = 0;
			waits = 0;
			queued = 0
		};
		do
		:: count > 0 ->
			count--;
			r = queue[count];
			queue[count] = 0;
#ifndef NOTE_LAST
			note(r);
#endif
			core_head(r)
		:: else -> break
		od;
		r = 0;
		blocked = true;
		!mapping;
		noflush = false;
		/* dmu_resume(), dmu_returned_expect() */
		requeue = false;
		d_step { blocked = false; resumed = true }
	:: else -> break
	od
}

/* The worker answers for the head of the queue: dmu_process() */
active proctype worker()
{
	byte r;

end:	do
	:: d_step {
		len(cell) > 0 ->
		cell?r;
		assert(!(before[r] & ~served));
		served = served | bit_of(r);
		queued = queued & ~bit_of(r);
		r = 0
	   }
	od
}

active proctype none_lost()
{
	served == 14
}
