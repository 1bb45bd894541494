/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dmu-node.c: /dev/dmu/NAME, its messages and its answers. See dmu-map.h for what is said of each
 * function.
 */
#ifndef DMU_NODE_H
#define DMU_NODE_H

#include "dmu-core.h"

/* Process, once, at load and at unload. */
int dmu_node_init(void);
void dmu_node_exit(void);

/* Process; dmu_devices_mutex held. Shows the device to user space, and hides it. */
int dmu_node_add(struct dmu_device *dev);
void dmu_node_remove(struct dmu_device *dev);

/* Process. Gives up a reference: openers have one each, the tables one together. */
void dmu_device_put(struct dmu_device *dev);

/*
 * As gfp says; takes lock. An event for the opener of now, the caller's; NULL without memory, or
 * when too many are unread. It counts as unread until it is freed, read or dropped.
 */
struct dmu_event *dmu_event_alloc(struct dmu_device *dev, gfp_t gfp);

/* Any; takes lock. */
void dmu_event_free(struct dmu_device *dev, struct dmu_event *event);

/* Any; takes lock. Sends the event, which is the node's from then on, or drops it. */
void dmu_event_post(struct dmu_device *dev, struct dmu_event *event);

/*
 * Any; lock held since the placement was dropped. Sends the event as one that says that a placement
 * came to nothing; it is for whoever is the worker by now.
 */
void dmu_map_error(struct dmu_device *dev, struct dmu_event *event, u64 block, u64 mark,
		   int error);

/* Any; takes lock. Tells that a backing device has failed under a request, if there is memory. */
void dmu_device_error(struct dmu_device *dev, struct bio *bio, bool write, int error);

#endif
