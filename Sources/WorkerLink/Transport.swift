// SPDX-License-Identifier: Apache-2.0
// How a disk's requests come to its worker.

/// The way by which the kernel reaches a disk, as it is asked for.
package enum Transport: String, Sendable, CaseIterable {
  /// The device-mapper when the module is there and the image is one for it, else nbd.
  case auto
  /// The device-mapper's target `userspace`.
  case dm
  /// The nbd driver.
  case nbd
}
