// SPDX-License-Identifier: Apache-2.0

/// Bounds of a target's memory.
package struct TargetLimits: Sendable {
  /// Runs of blocks to remember; committed ones beyond are forgotten.
  package var extents = 32768
  /// Requests under way at once.
  package var requests = 4096
  /// Bytes for putting blocks together; room for two pieces at least.
  package var scratch = 2 << 20
  /// A block is put together in pieces of at most so many bytes, however large it is.
  package var piece = 1 << 20

  /// The defaults.
  package init() {}
}
