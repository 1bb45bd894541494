// SPDX-License-Identifier: Apache-2.0
// What is done to every image: opened, described, read, written, committed, checked, mended.
// Errors are what hostile bytes deserve; a trap, a hang or much memory is a find.

import BlockIO
import DiskFormats
import SystemIO

/// How much is done to an image.
enum Effort: String {
  /// Headers are parsed, the image is opened, and asked where some blocks are.
  case head
  /// It is checked and read as well.
  case read
  /// It is written, committed, discarded and mended as well.
  case use
}

/// Everything that can be done to an image of one format.
struct Harness {
  let kind: ImageKind
  let effort: Effort

  private var writes: Bool { effort == .use }

  private func attempt(_ body: () throws -> Void) {
    do { try body() } catch is ImageError {} catch is IOError {} catch {
      fatalError("an error of another room: \(error)")
    }
  }

  func use(_ bytes: [UInt8]) {
    let store = FuzzStore("hostile", bytes)
    attempt { _ = try FormatList.all.probe(store) }
    guard effort != .head else {
      attempt { try ask(try open(store).image) }
      // The same at the start of a sparse file, as long as any header may ask for.
      attempt { try ask(try open(FuzzStore("sparse", bytes, size: 1 << 60)).image) }
      return
    }
    check(store)
    attempt {
      let (image, base) = try open(store)
      let engine = DeviceEngine(image, store: store, base: base)
      if writes { try write(engine) } else { read(engine) }
    }
    if writes {
      check(store)
      check(store, .all)
    }
  }

  /// A base that is no image; files of data and extents with room to write in.
  private func beside(_ path: String) -> FuzzStore {
    FuzzStore(path, [UInt8](repeating: 0xB5, count: 65536), size: 1 << 20)
  }

  private func extents(_ store: FuzzStore) throws(ImageError) -> [any ByteStore] {
    try VmdkLayout.read(from: store).extentPaths.prefix(64).map { beside($0) }
  }

  /// The image, and the base that it asked for first.
  private func open(
    _ store: FuzzStore
  ) throws(ImageError) -> (image: any ImageFormat, base: FuzzStore?) {
    var base: FuzzStore?
    let image = try Chain(store, kind: kind, depth: 4) {
      (request) throws(ImageError) in
      let file = beside(request.path)
      if request.role == .base, base == nil { base = file }
      return file
    }.disk(writable: writes)
    return (image, base)
  }

  private func ask(_ image: any ImageFormat) throws {
    let blocks = (image.size + UInt64(image.blockSize) - 1) / UInt64(image.blockSize)
    for block in [0, 1, blocks / 2, blocks &- 1] where block < blocks {
      attempt { _ = try image.find(block, limit: blocks - block) }
    }
  }

  /// Reads where something may be: the first blocks, the last, and some between.
  private func read(_ engine: DeviceEngine) {
    let step = max(engine.sectors / 32, 64)
    for sector in stride(from: 0, to: engine.sectors, by: step) {
      attempt { _ = try engine.read(sector, count: min(64, engine.sectors - sector)) }
    }
    let tail = min(64, engine.sectors)
    attempt { _ = try engine.read(engine.sectors - tail, count: tail) }
  }

  private func write(_ engine: DeviceEngine) throws {
    let sectors = engine.sectors
    guard sectors > 64 else { return }
    attempt { try engine.write(9, [UInt8](repeating: 5, count: 512 * 20)) }
    attempt { try engine.discard(0, count: min(sectors, 4096), zeroing: true) }
    attempt { try engine.write(sectors / 2, [UInt8](repeating: 7, count: 512 * 3)) }
    attempt { try engine.flush() }
    attempt { try engine.write(sectors - 5, [UInt8](repeating: 6, count: 512 * 5)) }
    attempt { try engine.discard(sectors - 64, count: 64, zeroing: false) }
    attempt { try engine.flush() }
    read(engine)
  }

  private func check(_ store: FuzzStore, _ repair: Repair? = nil) {
    attempt {
      let format = kind.format
      let files = format.checksFiles ? try extents(store) : []
      _ = try format.check(store, files: files, repair: repair)
      if repair == nil { _ = try format.snapshots(of: store) }
    }
  }
}
