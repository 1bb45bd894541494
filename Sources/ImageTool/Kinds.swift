// SPDX-License-Identifier: Apache-2.0
// What the commands have formats do to images that are more than a file: with what is under them,
// or beside them.

import ImageFormats
import Posix

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
      files = try LayerChain.files(of: store, decision, resolve: resolve)
    }
    return try format.check(store, files: files, repair: repair)
  }

  /// Gives a disk another length.
  static func resize(
    _ store: any ByteStore, _ decision: FormatDecision, baseKind: ImageKind? = nil,
    among formats: DiskFormats = .all, to size: UInt64, contentID: UInt32? = nil,
    resolve: ImageChain.Resolver
  ) throws(ImageError) {
    var parts = try ImageChain.parts(
      store, decision, baseKind: baseKind, among: formats, resolve: resolve)
    parts.writable = true
    parts.contentID = contentID
    try decision.kind.format.resize(parts, to: size)
  }
}

/// Runs system calls, turning their error into one of images.
func toolIO<Result>(_ body: () throws(IOError) -> Result) throws(ImageError) -> Result {
  do throws(IOError) { return try body() } catch { throw ImageError(error) }
}
