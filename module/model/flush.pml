/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of commit on flush and of marks: placements, flushes, forced writes, the worker and its
 * successor, power cuts.
 *
 * Checked properties
 *
 *   flush      A flush that ends covers what had ended when it was sent: the data is on the
 *              medium, and so is the worker's metadata that finds it.
 *   forced     So does a write with FUA for itself.
 *   data first The worker's metadata never reaches the medium before the data does.
 *   dropped    A placement that the module counts no more was committed, or has failed.
 *   own mark   A MAP_ERROR that a worker reads is about the placement that the worker knows
 *              by that mark.
 *   none lost  Every flush ends.
 *
 * Each step names the function of module/ that it stands for; what is held together by dev->lock
 * is one atomic step, unless something is read without the lock: dev->uncommitted and the index.
 *
 * Abstracted: each placement is of another block; cells (cell.pml), epochs (epoch.pml); devices
 * do not fail a flush (what follows is sticky and simple). The medium has what a flush of the
 * device brought there and nothing else, which is the worst that a power cut can leave.
 *
 * Amounts: DEATHS of the worker, ERRORS of the new place; QUIET has no flushes.
 *
 * Variants that must fail
 *
 *   INDEX_FIRST    a place enters the index before its placement is listed: who finds the place
 *                  there finds nothing uncommitted, and skips the commit
 *   NO_DATA_WAIT   a flush does not wait for the data of what is being placed
 *   UPTO_LATE      a flush takes its mark after the devices were flushed
 *   DROP_ALL       FLUSH_DONE drops more than the placements up to the mark of the flush
 *   JOIN_RUNNING   a flush joins the one that is under way instead of the next
 *   QUESTION_FIRST the worker reads the question of a flush before PLACED
 *   ERROR_LATE     a failed placement is dropped, and MAP_ERROR queued later: a flush commits it,
 *                  or a successor has given its mark to another one meanwhile (QUIET)
 *   LOWERED        dmu_open() goes back to the highest mark that is listed or that a flush under
 *                  way has: right by itself, and not with ERROR_LATE, or with
 *   REUSE          which leaves out the flush
 */
#define MOST 2			/* placements */
#ifndef DEATHS
#define DEATHS 1
#endif
#ifndef ERRORS
#define ERRORS 1
#endif

/* Placements by number, from 1. */
byte mark[MOST + 1];
bool listed[MOST + 1], in_flight[MOST + 1], untold[MOST + 1], lost[MOST + 1];
bool word[MOST + 1];		/* the index: the place may be written */
byte cache[MOST + 1], medium[MOST + 1];		/* its data, as a version; 0 is what was there */
byte ended[MOST + 1];		/* the last version whose write has ended */
bool committed[MOST + 1];	/* the worker's metadata, on the medium */

/* dmu_device */
byte uncommitted, last_mark;
bool opened = true;
byte errors;			/* MAP_ERROR, a set of placements, in dev->events */

/* dmu_flush */
mtype = { IDLE, DATA, DEVICES, ASKING, ASKED };
mtype state = IDLE;
byte waiting, running, over;	/* sets of requests */
byte upto;
bool queued;

byte failures;			/* of the new place, so far */
byte known;			/* placements that the opener of now knows of */

#define FLUSH 1
#define FORCED 2

inline flush_devices() { d_step { medium[1] = cache[1]; medium[2] = cache[2] } }

/* What a power cut would show now. */
inline check_durable(p, version)
{
	assert(!version || (medium[p] >= version && committed[p]))
}

/* dmu_flush_join() */
inline join(request)
{
	atomic {
#ifdef JOIN_RUNNING
		if
		:: state != IDLE -> running = running | request
		:: else -> waiting = waiting | request
		fi;
#else
		waiting = waiting | request;
#endif
		queued = true
	}
	/* dmu_flush_end() */
	over & request
}

/* dmu_placed_add(); dev->lock is held. */
inline add(p)
{
	last_mark++;
	mark[p] = last_mark;
	listed[p] = true
}

/*
 * A placement: of a grant, or of an answer (told: the worker knows of it); for a write (in
 * flight until its data is there), or remembered only, of data that the worker has written.
 */
proctype place(byte p)
{
	bool write, told;

	if
	:: write = true; told = false		/* dmu_grant_place() */
	:: write = true; told = true		/* dmu_map_write() */
	:: write = false; told = true		/* dmu_map_plain() */
	fi;
	if
	:: !write -> cache[p] = 1
	:: else
	fi;
	/* dmu_grant_place(), dmu_remember(): nobody answers without an opener. */
#ifdef INDEX_FIRST
	atomic { opened -> word[p] = true };
#endif
	atomic {
		opened ->
		in_flight[p] = write;
		untold[p] = !told;
		if
		:: told -> known = known | (1 << p)
		:: else
		fi;
		add(p)
	};
	uncommitted++;
	word[p] = true;
	if
	:: write ->
		if
		:: cache[p] = 1;	/* dmu_place_write() */
		   atomic { in_flight[p] = false; queued = true };	/* dmu_place_done() */
		   ended[p] = 1
		:: atomic { failures < ERRORS -> failures++ };
		   /* dmu_place_work() */
		   d_step { word[p] = false; cache[p] = 0; lost[p] = true };
#ifdef ERROR_LATE
		   atomic { in_flight[p] = false; untold[p] = false; listed[p] = false };
		   uncommitted--;
		   /* dmu_event_post() */
		   if
		   :: opened -> errors = errors | (1 << p)
		   :: else
		   fi;
#else
		   uncommitted--;
		   atomic {
			in_flight[p] = false;
			untold[p] = false;
			listed[p] = false;
			/* dmu_map_error() */
			if
			:: opened -> errors = errors | (1 << p)
			:: else
			fi
		   };
#endif
		   queued = true
		fi
	:: else -> ended[p] = 1
	fi
}
#ifndef QUIET
/* A write with FUA: dmu_remap(), dmu_end_io(). Its block is in its cell while it is prepared. */
active proctype forced_write()
{
	byte p;

end:	/* nothing to write to: the placements have failed */
	if
	:: atomic { word[1] && !in_flight[1] && !lost[1] -> p = 1 }
	:: atomic { word[2] && !in_flight[2] && !lost[2] -> p = 2 }
	fi;
	if
	:: !uncommitted ->
		d_step { cache[p] = 2; medium[p] = 2 }
	:: else ->
		cache[p] = 2;
		join(FORCED)
	fi;
	d_step { check_durable(p, 2); ended[p] = 2 }
}

/* A flush of the guest: dmu_map_flush() */
active proctype guest_flush()
{
	byte one, two;

	d_step { one = ended[1]; two = ended[2] };
	if
	:: !uncommitted -> flush_devices()
	:: else -> join(FLUSH)
	fi;
	d_step { check_durable(1, one); check_durable(2, two) }
}

#endif

#define in_round(p)  (listed[p] && mark[p] <= upto)
#define waited(p)    (in_round(p) && in_flight[p])

/* dmu_flush_end(); dev->lock is held. */
inline flush_end() { over = over | running; running = 0; state = IDLE }

/* dmu_flush_work() */
active proctype flush_work()
{
end:	do
	:: atomic { queued -> queued = false };
	   do
	   :: atomic {
		state == IDLE && waiting ->
		running = waiting;
		waiting = 0;
		upto = last_mark;
		state = DATA
	      }
	   :: atomic {
#ifdef NO_DATA_WAIT
		state == DATA ->
#else
		state == DATA && !waited(1) && !waited(2) ->	/* dmu_flush_data_done() */
#endif
		state = DEVICES
	      };
	      flush_devices();
#ifdef UPTO_LATE
	      upto = last_mark;
#endif
	      /* dmu_flush_devices_done() */
	      atomic {
		if
		:: in_round(1) || in_round(2) -> state = ASKING
		:: else -> flush_end()
		fi
	      }
	   :: else -> break
	   od
	od
}

inline drop(p)
{
	if
#ifdef DROP_ALL
	:: listed[p] ->
#else
	:: in_round(p) ->
#endif
		assert(committed[p]);
		listed[p] = false;
		untold[p] = false;
		uncommitted--
	:: else
	fi
}

inline commit(p, to)
{
	if
	:: known & (1 << p) && mark[p] <= to ->
		assert(medium[p] >= 1);
		committed[p] = true
	:: else
	fi
}

/* A MAP_ERROR for p: the worker takes its placement with that mark for lost. */
inline map_error(p)
{
	if
	:: errors & (1 << p) ->
		errors = errors & ~(1 << p);
		assert(!(known & (1 << 1)) || mark[1] != mark[p] || lost[1]);
		assert(!(known & (1 << 2)) || mark[2] != mark[p] || lost[2]);
		known = known & ~(1 << p)
	:: else
	fi
}

#define question (state == ASKING)
#ifdef QUESTION_FIRST
#define may_ask question
#else
#define may_ask (question && !untold[1] && !untold[2] && !errors)
#endif

active proctype worker()
{
	byte to, deaths;

end:	do
	:: atomic {			/* dmu_next(): PLACED */
		untold[1] || untold[2] ->
		if
		:: untold[1] && (!untold[2] || mark[1] < mark[2]) ->
			untold[1] = false;
			known = known | 2
		:: else ->
			untold[2] = false;
			known = known | 4
		fi
	   }
	:: atomic {			/* dmu_next(): the events */
		errors && !untold[1] && !untold[2] ->
		map_error(1);
		map_error(2)
	   }
	:: atomic { may_ask -> state = ASKED; to = upto };
	   if
	   :: atomic { commit(1, to); commit(2, to) };
	      /* dmu_flush_answer() */
	      atomic { drop(1); drop(2); flush_end(); queued = true }
	   :: deaths < DEATHS -> goto dead
	   fi
	:: deaths < DEATHS ->
dead:	   deaths++;
	   atomic {			/* dmu_release() */
		opened = false;
		untold[1] = false;
		untold[2] = false;
		errors = 0;
		known = 0;
		if
		:: state == ASKED -> state = ASKING
		:: else
		fi
	   };
	   atomic {			/* dmu_open() */
		opened = true;
#ifdef LOWERED
		last_mark = 0;
		if
		:: listed[1] -> last_mark = mark[1]
		:: else
		fi;
		if
		:: listed[2] && mark[2] > last_mark -> last_mark = mark[2]
		:: else
		fi;
#ifndef REUSE
		if
		:: state != IDLE && upto > last_mark -> last_mark = upto
		:: else
		fi;
#endif
#endif
		/* DUMP */
		known = (listed[1] << 1) | (listed[2] << 2)
	   }
	od
}

init { atomic { run place(1); run place(2) } }
