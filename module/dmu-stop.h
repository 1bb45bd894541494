/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Stop points: places between two steps of a path where a test of a debug build holds a thread, or
 * where threads are delayed at random. A build without DMU_STOP_POINTS has nothing of them.
 */
#ifndef DMU_STOP_H
#define DMU_STOP_H

enum dmu_stop {
	DMU_STOP_LOOKED,	/* a request has read the index, not looked for cells yet */
	DMU_STOP_SEARCHING,	/* a request is about to look for cells, under the lock */
	DMU_STOP_HOLDING,	/* the index serves it not: it is about to be queued */
	DMU_STOP_RETURNING,	/* a suspend wants it back: it is about to go */
	DMU_STOP_CLAIMED,	/* an answer has its cell, not yet the cell's request */
	DMU_STOP_POPPED,	/* an answer has taken a read, which it has not served yet */
	DMU_STOP_ANSWERING,	/* answer_mutex is held, an answer is about to be read */
	DMU_STOP_READING,	/* a message is taken, not yet copied to the reader */
	DMU_STOP_COLLECTED,	/* what waits is taken away, and has not ended yet */
	DMU_STOP_SUSPENDING,	/* what waited was given back, the core takes requests still */
	DMU_STOP_UNDOING,	/* a suspend is interrupted, requests may come again */
	DMU_STOP_LISTED,	/* a placement is listed, its place not in the index yet */
	DMU_STOP_WRITING,	/* copies to a place are begun, the write is about to be sent */
	DMU_STOP_WRITTEN,	/* it is done, the cell stands */
	DMU_STOP_FORGOTTEN,	/* a failed place is out of the index, its placement listed still */
	DMU_STOP_DROPPED,	/* the placement is dropped, the request has not ended yet */
	DMU_STOP_ENDED,		/* the request of a cell has ended, its cell stands */
	DMU_STOP_SCATTERED,	/* a cell is gone, its requests are about to be sent */
	DMU_STOP_GRANTING,	/* a cell is about to be placed by a grant */
	DMU_STOP_TOUCHING,	/* a touch is about to begin */
	DMU_STOP_MISSED,	/* a read has found no touch, and looks at the bits again */
	DMU_STOP_TOUCHED,	/* a touch has ended, its bits are not set yet */
	DMU_STOP_FLUSHING,	/* a flush is about to take its next step */
	DMU_STOP_TURNING,	/* invalidations are about to turn the epoch */
	DMU_STOP_OPENING,	/* the device of a node is found, it is not opened yet */
	DMU_STOP_CLOSING,	/* an opener goes, its questions are its own still */
	DMU_STOP_HIDDEN,	/* nobody finds the device any more, nothing of it has ended */
	DMU_STOPS
};

#ifdef DMU_STOP_POINTS
void dmu_stop(enum dmu_stop at);
#else
static inline void dmu_stop(enum dmu_stop at)
{
}
#endif

#endif
