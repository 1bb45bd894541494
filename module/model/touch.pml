/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of a layer (dmu-layer.c): one block that has one place, a bit that says whether it is
 * there, a write of all of it (a touch), a write of a part of it (a cell), reads, flushes.
 *
 * Checked properties
 *
 *   read       A read returns, of each part, the bytes of a write that had not been followed by
 *              another one that had ended when the read came; never what was at the place before.
 *   order      A read that comes after a touch was sent finds it.
 *   flush      A flush that ends covers what had ended when it was sent: the data is on the medium,
 *              and so is the worker's bit.
 *   forced     Who finds the block there and nothing uncommitted may count on the worker's bit.
 *   data first The worker's bit never reaches the medium before the data of all of the block does.
 *   none lost  Every request ends.
 *
 * Each step names the function of module/ that it stands for. What is held together by a lock is one
 * atomic step, unless something of it is read without the lock: the bit, touched, the cell, removals.
 *
 * Abstracted: other blocks, but that they may be why there is a flush; the worker answers at once (grants); places that fail; what waits
 * behind a cell looks again when the cell has gone. The medium has what a flush of the device
 * brought there and nothing else.
 *
 * Variants that must fail
 *
 *   NO_WAIT       a cell does not wait for touches that are under way: what it carries along from
 *                 below is written over theirs
 *   NO_STOP       a touch begins although a cell stands: the same
 *   LOOK_APART    a touch looks for cells and counts itself in two steps: the same
 *   NO_LOOK       a read does not look for touches under way
 *   LOOK_ONCE     a read does not look at the bit again after that
 *   BIT_EARLY     the bit is set when the touch begins: a read finds what was at the place before
 *   TOUCHED_LATE  the bit is set, then it counts as uncommitted
 *   CLOSE_LATE    a flush closes the round after the devices were flushed
 *   TELL_ALL      a flush tells the bits of the round that goes on, too
 *   CLEAR_ALL     FLUSH_DONE clears the bits of both rounds
 */
#define PARTS 2			/* 0: what the partial write covers; 1: the rest of the block */
#ifndef FLUSHES
#define FLUSHES 2
#endif

/* Versions: 1 is below, 2 the touch's, 3 the partial write's; 0 is what is at the place before. */
byte store[PARTS], medium[PARTS];
bool committed;			/* the worker's bit, on the medium */

/* dmu_layer, and what counts for it in dmu_device */
bool present, dirty[2], round;
byte touches, cells, touched;

/* dmu_device; the cell of the block */
bool cell, listed, in_flight;
byte removals;

/* What the properties are about. */
bool touch_ended, part_ended;
bool touch_begun;		/* it was sent, as a touch */
bool touch_after, part_after;	/* it began when the other one had ended */

/* What of a part may be read, or be on the medium, of writes that had ended. */
inline check(p, value, touch_was, part_was)
{
	assert(value);
	if
	:: p == 1 -> assert(value == 2 || (value == 1 && !touch_was))
	:: p == 0 && touch_was && part_was ->
		assert(value == 2 || value == 3);
		assert(!part_after || value == 3);
		assert(!touch_after || value == 2)
	:: p == 0 && (touch_was ^ part_was) -> assert(value == 2 || value == 3)
	:: else
	fi
}

/* A write of all of it. */
active proctype touch()
{
	bool begun;

	touch_after = part_ended;
again:
	if
	:: present ->		/* dmu_find(), then a look for cells: the same place anyhow */
		if
		:: cell -> !cell; goto again
		:: else -> d_step { store[0] = 2; store[1] = 2 }
		fi
	:: else ->
		/* dmu_touch_begin() */
#ifdef LOOK_APART
		begun = !cells;
		if
		:: begun -> touches++
		:: else
		fi;
#else
		atomic {
#ifdef NO_STOP
			begun = true;
#else
			begun = !cells;
#endif
			if
			:: begun -> touches++
			:: else
			fi
		}
#endif
		if
		:: !begun -> !cell; goto again	/* dmu_hold(): it queues behind the cell */
		:: else
		fi;
#ifdef BIT_EARLY
		present = true;
#endif
		/* The device has it, and serves what it gets later after it. */
		d_step { store[0] = 2; store[1] = 2; touch_begun = true };
		/* dmu_touch_end(), under layer->lock */
#ifdef TOUCHED_LATE
		atomic {
			if
			:: !present -> dirty[round] = true; present = true
			:: else -> begun = false
			fi
		}
		if
		:: begun -> touched++
		:: else
		fi;
#else
		atomic {
			begun = !present;
#ifdef BIT_EARLY
			begun = true;
#endif
			if
			:: begun -> dirty[round] = true; touched++
			:: else
			fi
		}
		present = true;
#endif
		touches--
	fi;
	touch_ended = true
}

/* A write of a part of it. */
active proctype part()
{
	part_after = touch_ended;
again:
	if
	:: present ->
		if
		:: cell -> !cell; goto again
		:: else -> store[0] = 3
		fi
	:: else ->
		/* dmu_queue(): under dev->lock; dmu_cell_make(), then dmu_layer_stand() */
		cell = true;
		cells++;
#ifndef NO_WAIT
		touches == 0;		/* dmu_standing_work() */
#endif
		if
		:: present -> store[0] = 3	/* dmu_process() */
		:: else ->
			/* dmu_grant_place() */
			atomic { listed = true; in_flight = true };
			present = true;
			/* dmu_prepare(): the copy from below, and the write beside it */
			if
			:: store[1] = 1; store[0] = 3
			:: store[0] = 3; store[1] = 1
			fi;
			in_flight = false	/* dmu_place_done() */
		fi;
		/* dmu_cell_remove() */
		removals++;
		cell = false;
		cells--
	fi;
	part_ended = true
}

active proctype read()
{
	bool touch_was, part_was, touch_came, there, stands;
	byte count, value[PARTS];

	d_step { touch_was = touch_ended; part_was = part_ended; touch_came = touch_begun };
again:
	count = removals;		/* dmu_lookup() */
	there = present;
#ifndef NO_LOOK
	if
	:: !there && touches -> touches == 0; goto again	/* dmu_touch_meets() */
	:: else
	fi;
#ifndef LOOK_ONCE
	if
	:: !there && present -> goto again
	:: else
	fi;
#endif
#endif
	stands = cell;
	if
	:: stands -> !cell; goto again
	:: else
	fi;
	if
	:: removals != count -> goto again
	:: else
	fi;
	d_step {
		value[0] = (there -> store[0] : 1);
		value[1] = (there -> store[1] : 1)
	};
	check(0, value[0], touch_was, part_was);
	check(1, value[1], touch_was, part_was);
	assert(!touch_came || value[1] == 2)
}

/* A write with FUA, of which only matters that it finds the block there. */
active proctype forced()
{
	bool there, stands, waits;

	there = present;
	stands = cell;
	waits = touched || listed;	/* dmu_has_uncommitted() */
	assert(!there || stands || waits || committed)
}

inline flush_devices() { d_step { medium[0] = store[0]; medium[1] = store[1] } }

active proctype flush()
{
	bool touch_was, part_was, placed, told;
	byte left = FLUSHES;

	do
	:: left ->
		left--;
		d_step { touch_was = touch_ended; part_was = part_ended };
		if
		:: !touched && !listed -> flush_devices()	/* dmu_map_flush() */
		:: true ->		/* other blocks may be uncommitted, too */
			/* dmu_flush_work(): dmu_layer_close() */
#ifndef CLOSE_LATE
			atomic {
				if
				:: dirty[round] -> round = !round
				:: else
				fi;
				placed = listed
			}
#else
			placed = listed;
#endif
			!placed || !in_flight;		/* dmu_flush_data_done() */
			flush_devices();
#ifdef CLOSE_LATE
			atomic {
				if
				:: dirty[round] -> round = !round
				:: else
				fi
			}
#endif
			/* dmu_layer_next_closed(), and the worker's commit */
			atomic {
				told = dirty[!round];
#ifdef TELL_ALL
				told = dirty[0] || dirty[1];
#endif
				if
				:: told || placed ->
					assert(medium[0] && medium[1]);
					committed = true
				:: else
				fi
			}
			/* dmu_flush_answer(): dmu_layer_committed(), dmu_placed_drop() */
			atomic {
				if
				:: dirty[!round] -> dirty[!round] = false; touched--
				:: else
				fi;
#ifdef CLEAR_ALL
				if
				:: dirty[round] -> dirty[round] = false; touched--
				:: else
				fi
#endif
			}
			if
			:: placed -> listed = false
			:: else
			fi
		fi;
		if
		:: touch_was || part_was ->
			assert(committed);
			check(0, medium[0], touch_was, part_was);
			check(1, medium[1], touch_was, part_was)
		:: else
		fi;
		told = false;
		placed = false
	:: else -> break
	od
}
