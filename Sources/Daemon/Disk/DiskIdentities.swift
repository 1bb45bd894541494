// SPDX-License-Identifier: Apache-2.0
// Whether the files that have the names of a disk's files are still those that it was started with.

extension DiskIdentities {
  /// Throws when a store or a base that was opened by its name is another one than the disk was
  /// started with. What is not known is not compared.
  func check(_ opened: OpenImage, _ under: OpenImage?, _ spec: Spec) throws(DiskFailure) {
    guard store == nil || store == opened.identity else { throw .exchanged("store", spec.store) }
    guard base == nil || base == under?.identity else {
      throw .exchanged("base", spec.base ?? "of store \(spec.store)")
    }
  }
}

extension DiskFailure {
  static func exchanged(_ role: String, _ path: String) -> DiskFailure {
    DiskFailure(
      .io,
      "\(role) \(path) is another file than the one that the disk was started with: bring that one"
        + " back, or detach the disk and attach it again")
  }
}
