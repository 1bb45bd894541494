/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of the fast path and of the life of a cell: one block, its reads and writes.
 *
 * Checked properties
 *
 *   order      A request is served after those that came before it (docs/target.md, rule 2):
 *              a read returns the bytes of the last write that came before it and has not
 *              failed, and not those of a write that came after it had come to wait.
 *   carried    Nobody reads what was not carried along to the new place yet.
 *   its own    An answer is carried out for the request whose question it answers.
 *   none lost  Every request ends. spin reports the opposite as an invalid end state.
 *
 * Each step names the function of module/ that it stands for. A statement is one memory access
 * of one processor, and spin tries every interleaving of them. What is held together by dev->lock
 * is one atomic step, unless the fast path reads it without the lock: word, busy, bucket and
 * removals change in steps of their own, in the order of the code. With weaker memory than that,
 * the pairs of barriers keep exactly these orders; a variant for each pair takes it away.
 *
 * Abstracted: other blocks, so the index is one word; discards; the deferred list (memory for a
 * cell is always there); epochs (epoch.pml), marks and flushes (flush.pml), suspends
 * (order.pml). A backing device serves requests at once, in the order in which it gets them. Of
 * the block, `part` is what each write covers, as a version, and `rest` what is carried along.
 *
 * Variants that must fail
 *
 *   NO_SECOND_LOOK  the fast path does not read dev->removals again: the read loads the old
 *                   word, a write is placed and done and its cell goes, the read finds no cell
 *   COLLECT_CLAIMED dmu_collect() does not make an orphan of a claimed cell: the answer takes
 *                   what queues next for the request of the question
 *   CELLS_FIRST     no order between the reading of the index and the look for cells
 *   COUNT_FIRST     no order between the look for cells and the second reading of removals
 *   COUNT_LATE      dmu_cell_remove() raises removals after the cell has gone
 *   CELL_EARLY      dmu_place_done() lets the cell go before the data is in its place
 *
 * Amounts: DEATHS of the worker, FAILS (fail_faults), ERRORS of the new place, GRANT (1 or 0).
 */
#ifndef DEATHS
#define DEATHS 1
#endif
#ifndef FAILS
#define FAILS 1
#endif
#ifndef ERRORS
#define ERRORS 1
#endif
#ifndef GRANT
#define GRANT 1
#endif

/* The index: not mapped, mapped to the old place for reading, mapped to the new one. */
#define NONE 0
#define OLD  1
#define NEW  2

/* Requests: writes of version 2 and 3, one after the other; two reads. */
#define BIOS 4
#define is_write(bio)     (bio <= 2)
#define version(bio)      (bio + 1)
#define serves(bio, word) (word == NEW || (word == OLD && !is_write(bio)))

mtype = { ASKING, ASKED, PARKED, CLAIMED, PREPARING };

/* Both places: the old one has version 1 of everything, the new one nothing of use. */
byte part[3], rest[3];

/* dmu_device */
byte word, busy, removals;
bool bucket;			/* the block's of dev->by_block, as seen without the lock */
bool locked, map_mutex, grant = GRANT;

/* The dmu_cell of the block, if there is one. */
bool cell, orphan, granting;
mtype state;
byte id, next_id, active_bio, asked_for;
chan bios = [BIOS] of { byte };

/* What the properties are about. */
byte begun = 1;			/* the last write that was submitted */
byte come = 1;			/* the last one that has come to wait, or was sent */
byte after[BIOS + 1];		/* a read came after this write */
byte before[BIOS + 1];		/* and before the one after this; 0: it did not wait */
bool ended[BIOS + 1], failed[BIOS + 1];

inline lock() { atomic { !locked -> locked = true } }
inline unlock() { locked = false }
inline lock_map() { atomic { !map_mutex -> map_mutex = true } }
inline unlock_map() { map_mutex = false }

inline check_read(bio, place)
{
	need = after[bio];
	after[bio] = 0;
	if
	:: need == 3 && failed[2] -> need = 2
	:: else
	fi;
	if
	:: need == 2 && failed[1] -> need = 1
	:: else
	fi;
	assert(rest[place] == 1);
	assert(part[place] >= need);
	assert(!before[bio] || part[place] <= before[bio]);
	before[bio] = 0;
	need = 0
}

/* dmu_issue(), or dmu_remap() and the core; the device serves it. */
inline issue(bio, place)
{
	d_step {
		if
		:: is_write(bio) ->
			assert(place == NEW && rest[NEW] == 1);
			assert(part[NEW] < version(bio));
			part[NEW] = version(bio)
		:: else ->
			check_read(bio, place)
		fi;
		ended[bio] = true
	}
}

inline fail(bio) { failed[bio] = is_write(bio); ended[bio] = true; after[bio] = 0; before[bio] = 0 }

/* bio_list_add(): the request has come. */
inline add(bio)
{
	d_step {
		bios!bio;
		if
		:: is_write(bio) -> come = version(bio)
		:: else -> before[bio] = begun
		fi
	}
}

/* bio_list_add_head() */
inline add_head(bio)
{
	d_step {
		bios!bio;
		turn = len(bios) - 1;
		do
		:: turn > 0 -> bios?other; bios!other; turn--
		:: else -> break
		od;
		turn = 0;
		other = 0
	}
}

/* dmu_cell_remove(); the caller holds dev->lock. */
inline remove()
{
	d_step { cell = false; granting = false; id = 0; asked_for = 0; orphan = false };
#ifdef COUNT_LATE
	bucket = false;
	busy--;
	removals++
#else
	removals++;
	bucket = false;
	busy--
#endif
}

/* dmu_ask() */
inline ask()
{
	d_step {
		bios?<asked_for>;
		next_id++;
		id = next_id;
		state = ASKING;
		orphan = false
	}
}

/* dmu_grant_offer(), else dmu_ask() */
inline offer_or_ask()
{
	atomic {
		bios?<other>;
		if
		:: is_write(other) && grant && word != NONE ->
			bios?active_bio;
			state = CLAIMED;
			granting = true
		:: else ->
			ask()
		fi;
		other = 0
	}
}

/* dmu_process() */
inline process()
{
	do
	:: lock();
	   if
	   :: len(bios) == 0 ->
		remove();
		unlock();
		break
	   :: len(bios) > 0 ->
		bios?<x>;
		if
		:: serves(x, word) ->
			bios?x;
			unlock();
			/* dmu_try_issue() */
			w = word;
			if
			:: serves(x, w) ->
				issue(x, w)
			:: else ->
				lock();
				add_head(x);
				unlock()
			fi
		:: else ->
			offer_or_ask();
			unlock();
			break
		fi
	   fi
	od;
	atomic { x = 0; w = 0 }
}

/* dmu_lookup(): serve is set when the word w serves the request. */
inline lookup(bio)
{
	do
	:: count = removals;
#ifdef CELLS_FIRST
	   cells = busy;
	   w = word;
#else
	   w = word;
#endif
	   serve = serves(bio, w);
	   if
	   :: !serve -> break
	   :: else
	   fi;
#ifdef COUNT_FIRST
	   again = removals != count;
#endif
#ifndef CELLS_FIRST
	   cells = busy;
#endif
	   if
	   :: cells ->
		cells = bucket;		/* dmu_may_wait() */
		if
		:: cells ->
			/* dmu_free_run() */
			atomic { !locked -> serve = !cell };
			if
			:: !serve -> break
			:: else
			fi
		:: else
		fi
	   :: else
	   fi;
#ifdef NO_SECOND_LOOK
	   again = false;
#endif
#if !defined(COUNT_FIRST) && !defined(NO_SECOND_LOOK)
	   again = removals != count;
#endif
	   if
	   :: !again -> break
	   :: else
	   fi
	od;
	atomic { count = 0; cells = 0; again = false }
}

/* dmu_hold(), dmu_queue(), dmu_cell_make(): held is set unless the index serves it by now. */
inline hold(bio)
{
	lock();
	if
	:: cell ->
		add(bio);
		held = true
	:: !cell && serves(bio, word) ->
		held = false
	:: !cell && !serves(bio, word) ->
		cell = true;
		bucket = true;
		busy++;
		add(bio);
		offer_or_ask();
		held = true
	fi;
	unlock()
}

/* dmu_map() */
inline map(bio)
{
	d_step {
		if
		:: is_write(bio) -> begun = version(bio)
		:: else -> after[bio] = come
		fi
	}
	do
	:: lookup(bio);
	   if
	   :: serve ->
		issue(bio, w);
		if
		:: is_write(bio) -> come = version(bio)
		:: else
		fi;
		break
	   :: else ->
		hold(bio);
		if
		:: held -> break
		:: else
		fi
	   fi
	od;
	atomic { w = 0; serve = false; held = false }
}

proctype submit(byte first, last)
{
	byte w, cells, count, need, turn, other;
	bool serve, again, held;

	do
	:: first <= last -> map(first); first++
	:: else -> break
	od
}

/* dmu_grant_work() */
active proctype grant_work()
{
	byte from, turn, other;

end:	do
	:: atomic { granting && !locked -> granting = false };
	   /* dmu_grant_place() */
	   lock_map();
	   from = word;
	   lock();
	   if
	   :: from == OLD && grant ->
		state = PREPARING;
		unlock();
		word = NEW;		/* dmu_extent_store() */
		unlock_map()
	   :: else ->
		unlock();
		unlock_map();
		/* dmu_grant_ask() */
		lock();
		atomic { add_head(active_bio); active_bio = 0; ask() };
		unlock()
	   fi;
	   from = 0
	od
}

inline write_part()
{
	d_step {
		assert(part[NEW] < version(bio));
		part[NEW] = version(bio)
	}
}

/* dmu_prepare() to dmu_place_done() or dmu_place_work(): kcopyd and the devices do it. */
active proctype preparation()
{
	byte x, w, need, turn, other, bio, errors;
	bool more;

	/* The cell is in the hands of nobody else, and the word is set before it is prepared. */
end:	do
	:: atomic { cell && state == PREPARING && word == NEW && !locked -> bio = active_bio };
#ifdef CELL_EARLY
	   lock();
	   state = CLAIMED;
	   more = len(bios) > 0;
	   if
	   :: !more -> remove()
	   :: else
	   fi;
	   unlock();
#endif
	   /* dmu_place_carry() and dmu_place_write(), which end in any order */
	   if
	   :: rest[NEW] = rest[OLD]
	   :: write_part()
	   fi;
	   if
	   :: atomic {
		if
		:: rest[NEW] == 0 -> rest[NEW] = rest[OLD]
		:: else -> write_part()
		fi
	      };
#ifndef CELL_EARLY
	      /* dmu_place_done() */
	      lock();
	      active_bio = 0;
	      state = CLAIMED;
	      more = len(bios) > 0;
	      if
	      :: !more -> remove()
	      :: else
	      fi;
	      unlock();
#endif
	      ended[bio] = true;
	      if
	      :: more -> process()
	      :: else
	      fi
#ifndef CELL_EARLY
	   :: errors < ERRORS ->
	      /* The device fails: dmu_place_work() */
	      errors++;
	      lock_map();
	      word = NONE;		/* dmu_place_forget() */
	      unlock_map();
	      d_step { part[NEW] = 0; rest[NEW] = 0; active_bio = 0; fail(bio) };
	      atomic { !locked -> state = CLAIMED };
	      process()
#endif
	   fi;
	   d_step { bio = 0; more = false }
	od
}

/* dmu_fail_cell() */
inline fail_cell()
{
	lock();
	d_step {
		do
		:: len(bios) > 0 -> bios?x; fail(x)
		:: else -> break
		od;
		x = 0
	};
	remove();
	unlock()
}

/* dmu_claim(): claimed is set when the question is still there. */
inline claim()
{
	atomic {
		!locked ->
		claimed = cell && id == question && (state == ASKED || state == PARKED);
		if
		:: claimed -> state = CLAIMED
		:: else
		fi
	}
}

/* dmu_take_map() with an id */
inline answer_map()
{
	claim();
	if
	:: claimed && !is_write(asked_for) ->
		/* dmu_map_read() */
		lock_map();
		assert(word != NEW);
		word = OLD;
		unlock_map();
		process()
	:: claimed && is_write(asked_for) ->
		/* dmu_map_write() */
		bio = asked_for;
		atomic {
			!locked ->
			if
			:: !orphan && len(bios) > 0 ->
				bios?active_bio;
				assert(active_bio == bio)
			:: else -> skip
			fi
		};
		if
		:: !active_bio -> process()		/* dmu_map_orphan() */
		:: else ->
			/* dmu_remember() */
			lock_map();
			word = NEW;
			unlock_map();
			atomic { !locked -> state = PREPARING }
		fi
	:: else
	fi
}

/* dmu_release() and dmu_reask_all(), then the node is opened again */
inline die()
{
	lock();
	grant = false;
	if
	:: cell && (state == ASKED || state == PARKED) ->
		if
		:: orphan && len(bios) == 0 -> remove()
		:: orphan && len(bios) > 0 -> ask()
		:: !orphan -> state = ASKING
		fi
	:: else
	fi;
	unlock()
}

active proctype worker()
{
	byte question, x, w, need, turn, other, bio, deaths, waits;
	bool claimed;

end:	do
	:: atomic {
		/* dmu_next() */
		cell && state == ASKING && !locked ->
		state = ASKED;
		question = id
	   };
	   if
	   :: answer_map()
	   :: claim();			/* dmu_take_fail() */
	      if
	      :: claimed -> fail_cell()
	      :: else
	      fi
	   :: waits < 1 ->		/* dmu_take_wait(), dmu_take_retry() */
	      waits++;
	      atomic {
		!locked ->
		if
		:: cell && id == question && state == ASKED -> state = PARKED
		:: else
		fi
	      };
	      lock();
	      if
	      :: cell && id == question && state == PARKED ->
		if
		:: len(bios) == 0 -> remove()
		:: len(bios) > 0 -> ask()
		fi
	      :: else
	      fi;
	      unlock()
	   :: deaths < DEATHS -> deaths++; die()
	   fi;
	   d_step { question = 0; claimed = false; bio = 0 }
	od
}

/* dmu_fail_all(), dmu_collect() */
active proctype fail_faults()
{
	byte x, fails;

	do
	:: fails < FAILS ->
		fails++;
		lock();
		d_step {
			do
			:: len(bios) > 0 -> bios?x; fail(x)
			:: else -> break
			od;
			x = 0
		};
		if
		:: cell && state == ASKING -> remove()
#ifdef COLLECT_CLAIMED
		:: cell && (state == ASKED || state == PARKED) -> orphan = true
#else
		:: cell && (state == ASKED || state == PARKED || state == CLAIMED) -> orphan = true
#endif
		:: else
		fi;
		unlock()
	:: break
	od
}

init
{
	atomic {
		part[OLD] = 1;
		rest[OLD] = 1;
		if
		:: word = NONE
		:: word = OLD
		fi;
		run submit(1, 2);
		run submit(3, 4)
	}
	/* None is lost. */
	ended[1] && ended[2] && ended[3] && ended[4]
}
