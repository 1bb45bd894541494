/* SPDX-License-Identifier: GPL-2.0-only */
/* The tracepoints dmu:dmu_fault, dmu:dmu_answer, dmu:dmu_commit. A device is its minor. */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM dmu

#if !defined(DMU_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define DMU_TRACE_H

#include <linux/tracepoint.h>

TRACE_EVENT(dmu_fault,
	TP_PROTO(int minor, u32 type, u32 flags, u64 id, u64 block, u64 count),
	TP_ARGS(minor, type, flags, id, block, count),
	TP_STRUCT__entry(
		__field(int, minor)
		__field(u32, type)
		__field(u32, flags)
		__field(u64, id)
		__field(u64, block)
		__field(u64, count)
	),
	TP_fast_assign(
		__entry->minor = minor;
		__entry->type = type;
		__entry->flags = flags;
		__entry->id = id;
		__entry->block = block;
		__entry->count = count;
	),
	TP_printk("minor=%d type=%u flags=%#x id=%llu block=%llu count=%llu",
		  __entry->minor, __entry->type, __entry->flags, __entry->id,
		  __entry->block, __entry->count)
);

TRACE_EVENT(dmu_answer,
	TP_PROTO(int minor, u32 type, u32 flags, u64 id, u64 block, int result),
	TP_ARGS(minor, type, flags, id, block, result),
	TP_STRUCT__entry(
		__field(int, minor)
		__field(u32, type)
		__field(u32, flags)
		__field(u64, id)
		__field(u64, block)
		__field(int, result)
	),
	TP_fast_assign(
		__entry->minor = minor;
		__entry->type = type;
		__entry->flags = flags;
		__entry->id = id;
		__entry->block = block;
		__entry->result = result;
	),
	TP_printk("minor=%d type=%u flags=%#x id=%llu block=%llu result=%d",
		  __entry->minor, __entry->type, __entry->flags, __entry->id,
		  __entry->block, __entry->result)
);

TRACE_EVENT(dmu_commit,
	TP_PROTO(int minor, u64 id, u64 mark, int error),
	TP_ARGS(minor, id, mark, error),
	TP_STRUCT__entry(
		__field(int, minor)
		__field(u64, id)
		__field(u64, mark)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->minor = minor;
		__entry->id = id;
		__entry->mark = mark;
		__entry->error = error;
	),
	TP_printk("minor=%d id=%llu mark=%llu error=%d",
		  __entry->minor, __entry->id, __entry->mark, __entry->error)
);

#endif

#undef TRACE_INCLUDE_PATH
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_PATH .
#define TRACE_INCLUDE_FILE dmu-trace
#include <trace/define_trace.h>
