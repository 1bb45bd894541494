// SPDX-License-Identifier: Apache-2.0
// What the commands have formats do to images that are more than a file: with what is under them,
// or beside them.

import BlockIO
import DiskFormats
import SystemIO

/// Formats at work.
enum Kinds {
  /// Checks an image, and mends it as far as is asked; nil when the format has nothing to check.
  /// `untrusted`: no file that it names is opened.
  static func check(
    _ store: FileStore, _ decision: FormatDecision, repair: Repair?, untrusted: Bool
  ) throws(ImageError) -> CheckReport? {
    let format = decision.kind.format
    var files: [any ByteStore] = []
    if format.checksFiles {
      let writing: Set<String> = repair == nil ? [] : [store.name]
      let resolve = ImageSource.resolver(writing: writing, untrusted: untrusted)
      files = try ChainLink(store, decision, resolve: resolve).files
    }
    return try format.check(store, files: files, repair: repair)
  }

  /// Gives a disk another length.
  static func resize(
    _ store: any ByteStore, _ decision: FormatDecision, baseKind: ImageKind? = nil,
    among formats: FormatList = .all, to size: UInt64, contentID: UInt32? = nil,
    resolve: Chain.Resolver
  ) throws(ImageError) {
    let chain = try Chain(
      store, decision, baseKind: baseKind, among: formats, resolve: resolve)
    var parts = try chain.parts()
    parts.writable = true
    parts.contentID = contentID
    try decision.kind.format.resize(parts, to: size)
  }
}

/// Runs system calls, turning their error into one of images.
func toolIO<Result>(_ body: () throws(IOError) -> Result) throws(ImageError) -> Result {
  do throws(IOError) { return try body() } catch { throw ImageError(error) }
}
