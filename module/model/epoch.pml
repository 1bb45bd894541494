/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of invalidation: two blocks, requests that are under way, and epochs.
 *
 * Checked properties
 *
 *   out of reach  After INVALIDATE_DONE no request reads or writes the place that the block had
 *                 (docs/target.md, rule 6): the worker gives that place to something else.
 *   not again     An epoch that all have left is not entered until it is set up again.
 *   told          Every INVALIDATE is followed by its INVALIDATE_DONE.
 *
 * Each step names the function of module/ that it stands for. A statement is one memory access of
 * one processor. A percpu_ref is its count, whether it is live, and, once it is killed, the readers
 * for which its RCU grace period still waits: it is zero when it is killed, nobody has it and no
 * reader of then is left. RCU gives no more than that here.
 *
 * Abstracted: cells and questions (cell.pml). A request that finds no mapping goes away.
 *
 * Amounts: REQUESTS of one processor, ROUNDS of invalidations of one block; TWO such processors.
 *
 * Variants that must fail
 *
 *   WORD_FIRST   dmu_epoch_enter_rcu() has no acquire: the index is read before dev->epoch
 *   TURN_FIRST   dmu_take_invalidate() asks for the turn before it changes the index
 *   NO_RCU       the epoch is read and entered without the RCU read lock
 *   JOIN_TURN    an invalidation that comes during a turn is told with that turn
 *   EPOCH_LATE   a cell enters its epoch after it was given its place, not before
 *   NO_PREPARED  a cell that is prepared is in no epoch
 */
#define BLOCKS 2
#define PREPARER 2		/* the bit of grant_work among the readers */
#ifndef REQUESTS
#define REQUESTS 2		/* one after the other */
#endif
#ifndef ROUNDS
#define ROUNDS 2		/* how often block 0 moves */
#endif

/* dmu_device. A block's places are 2 * block + 1 and 2 * block + 2; 0 is none. */
byte word[BLOCKS];
bit epoch;
bool turning, queued;
byte invalidations, draining;	/* sets of blocks */

/* The percpu_ref of both epochs. */
byte count[2];
bool killed[2];
byte grace[2];			/* a set of readers */
byte readers;			/* those in an RCU read section now */

bool reused[2 * BLOCKS + 1];
bool told[BLOCKS];

#define zero(e) (killed[e] && !grace[e] && !count[e])

#ifdef NO_RCU
inline rcu_read_lock(me) { skip }
inline rcu_read_unlock(me) { skip }
#else
inline rcu_read_lock(me) { readers = readers | (1 << me) }
inline rcu_read_unlock(me)
{
	d_step {
		readers = readers & ~(1 << me);
		grace[0] = grace[0] & ~(1 << me);
		grace[1] = grace[1] & ~(1 << me);
		/* dmu_epoch_release() */
		if
		:: zero(0) || zero(1) -> queued = true
		:: else
		fi
	}
}
#endif

/* dmu_epoch_enter_rcu() */
inline enter()
{
	e = epoch;
	d_step { assert(!zero(e)); count[e]++ }
}

/* dmu_epoch_leave(), dmu_epoch_release() */
inline leave()
{
	d_step {
		count[e]--;
		if
		:: zero(e) -> queued = true
		:: else
		fi;
		e = 0
	}
}

/* dmu_map() of a request that the index serves, to dmu_end_io() */
inline request(me, block)
{
	rcu_read_lock(me);
#ifdef WORD_FIRST
	place = word[block];
	enter();
#else
	enter();
	place = word[block];
#endif
	rcu_read_unlock(me);
	if
	:: place -> assert(!reused[place])	/* the device serves it */
	:: else
	fi;
	place = 0;
	leave()
}

proctype requests(byte me)
{
	byte place, n;
	bit e;

	do
	:: n < REQUESTS ->
		n++;
		if
		:: request(me, 0)
		:: request(me, 1)
		fi
	:: else -> break
	od
}

/* dmu_grant_cell() and its preparation: block 0 goes from its first place to its second. */
active proctype grant_work()
{
	byte from;
	bit e;

#if !defined(EPOCH_LATE) && !defined(NO_PREPARED)
	rcu_read_lock(PREPARER);
	enter();
	rcu_read_unlock(PREPARER);
#endif
	/* dmu_grant_place(), under map_mutex as the change by an invalidation is */
	atomic {
		from = word[0];
		if
		:: from == 1 && !reused[2] -> word[0] = 2
		:: else -> from = 0
		fi
	};
#ifdef EPOCH_LATE
	rcu_read_lock(PREPARER);
	enter();
	rcu_read_unlock(PREPARER);
#endif
	if
	:: from ->
		assert(!reused[1]);	/* kcopyd reads */
		assert(!reused[2])	/* and writes; so does dmu_place_write() */
	:: else
	fi;
	/* dmu_place_done() */
#ifndef NO_PREPARED
	leave()
#endif
}

/* dmu_epoch_work() */
active proctype epoch_work()
{
	byte done, block;
	bit old;
	bool turn;

end:	do
	:: atomic { queued -> queued = false };
	   if
	   :: turning ->
		old = 1 - epoch;
		if
		:: !zero(old) -> goto again
		:: else
		fi;
		d_step { killed[old] = false; assert(!count[old]) };	/* percpu_ref_reinit() */
		d_step { done = draining; draining = 0; turning = false }
	   :: else
	   fi;
	   d_step {			/* with the step before it, under dev->lock */
		if
		:: invalidations ->
			draining = invalidations;
			invalidations = 0;
			turning = true
		:: else
		fi
	   };
	   if
	   :: turning ->
		old = epoch;
		epoch = 1 - old;
		d_step {			/* percpu_ref_kill() */
			killed[old] = true;
			grace[old] = readers;
			if
			:: zero(old) -> queued = true
			:: else
			fi
		}
	   :: else
	   fi;
	   /* dmu_event_post() */
	   d_step {
		do
		:: block < BLOCKS ->
			if
			:: done & (1 << block) -> told[block] = true
			:: else
			fi;
			block++
		:: else -> break
		od;
		block = 0;
		done = 0
	   };
again:	   skip
	od
}

/* dmu_take_invalidate() and what the worker does then. */
inline erase(block) { d_step { place = word[block]; word[block] = 0 } }
inline ask_turn(block)
{
#ifdef JOIN_TURN
	d_step {
		if
		:: turning -> draining = draining | (1 << block)
		:: else -> invalidations = invalidations | (1 << block)
		fi
	};
#else
	invalidations = invalidations | (1 << block);	/* under dev->lock */
#endif
	queued = true
}

proctype worker(byte block, rounds)
{
	byte place;

	do
	:: rounds > 0 ->
		rounds--;
#ifdef TURN_FIRST
		ask_turn(block);
		erase(block);
#else
		erase(block);
		ask_turn(block);
#endif
		told[block];
		d_step { told[block] = false; reused[place] = true };
		/* dmu_take_map(): the block gets a place that is free. */
		if
		:: rounds > 0 ->
			d_step {
				if
				:: place == 2 * block + 1 -> place = 2 * block + 2
				:: else -> place = 2 * block + 1
				fi;
				reused[place] = false;
				word[block] = place;
				place = 0
			}
		:: else
		fi
	:: else -> break
	od
}

init
{
	atomic {
		word[0] = 1;
		word[1] = 3;
		run requests(0);
#ifdef TWO
		run requests(1);
#endif
		run worker(0, ROUNDS);
		run worker(1, 1)
	}
}
