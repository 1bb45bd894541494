// SPDX-License-Identifier: Apache-2.0
// A format in a shared library, behind the protocol that the built-in ones follow.
//
// What the library answers is not believed: extents are checked here for being of the disk and
// of a device that there is, so that a faulty plugin costs its own disk's requests and no more.
// It is code in this process all the same: only root may have put it where it is loaded from.

package import BlockIO
internal import CPlugin
package import DiskModel
import Glibc
import SystemIO

/// A disk whose blocks a plugin knows. Used from one thread.
package final class PluginFormat: ImageFormat {
  /// Length of the disk in bytes.
  package let size: UInt64
  /// Bytes of a block.
  package let blockSize: UInt32
  /// The store, the base or nothing, and what the plugin reads out itself.
  package let devices: [any ByteStore]?
  /// Blocks that were placed since the image was opened: what there was before is the
  /// plugin's own.
  package private(set) var allocatedBlocks: UInt64 = 0

  private let name: String
  private let plugin: UnsafePointer<dmu_plugin>
  private let host: PluginHost
  private let state: UnsafeMutableRawPointer?
  private let isWritable: Bool
  private var blocks: UInt64 { (size + UInt64(blockSize) - 1) / UInt64(blockSize) }

  /// Opens a store by a plugin.
  ///
  /// - Parameters:
  ///   - entry: the address of the library's `dmu_plugin`; the library stays loaded.
  ///   - name: what errors call the plugin.
  /// - Throws: `unsupported` for a plugin of another version or without a function that it
  ///   must have; `badRequest` for a disk that cannot be; `io` with what `open` answered.
  package init(
    entry: UnsafeMutableRawPointer, name: String, store: any ByteStore,
    base: (any ByteStore)?, writable: Bool
  ) throws(ImageError) {
    typealias Entry = @convention(c) () -> UnsafePointer<dmu_plugin>?
    guard let plugin = unsafeBitCast(entry, to: Entry.self)() else {
      throw ImageError(.unsupported, "plugin \(name) answers nothing: it is faulty")
    }
    let version = plugin.pointee.version
    guard version == UInt32(DMU_PLUGIN_VERSION) else {
      throw ImageError(
        .unsupported,
        "plugin \(name) is of version \(version) of the interface, this program of version"
          + " \(DMU_PLUGIN_VERSION): build it anew with this program's dmu_plugin.h")
    }
    guard let open = plugin.pointee.open, plugin.pointee.find != nil else {
      throw ImageError(.unsupported, "plugin \(name) has no 'open' or no 'find': it is faulty")
    }
    let given = [store] + (base.map { [$0] } ?? [])
    let host = PluginHost(given, writable: writable)
    var disk = dmu_disk()
    let code = open(host.pointer, &disk)
    guard code == 0 else {
      let cause = IOError(code, "open (by plugin \(name))", store.name)
      throw ImageError(.io, cause.description, cause: cause)
    }
    let isGood =
      disk.size > 0 && disk.size % 512 == 0 && disk.size < 1 << 56
      && disk.block_size.nonzeroBitCount == 1 && (512...2_097_152).contains(disk.block_size)
    guard isGood else {
      plugin.pointee.close?(disk.state)
      throw ImageError(
        .badRequest,
        "plugin \(name) has a disk of \(disk.size) bytes in blocks of \(disk.block_size): neither"
          + " may be so")
    }
    self.name = name
    self.plugin = plugin
    self.host = host
    state = disk.state
    size = disk.size
    blockSize = disk.block_size
    isWritable = writable
    devices = Self.devices(given, plugin, disk.state, name)
  }

  deinit { plugin.pointee.close?(state) }

  private static func devices(
    _ given: [any ByteStore], _ plugin: UnsafePointer<dmu_plugin>,
    _ state: UnsafeMutableRawPointer?, _ name: String
  ) -> [any ByteStore] {
    guard let read = plugin.pointee.read else { return given }
    // Its address only; the plugin promises to bear calls from any thread.
    let address = UInt(bitPattern: state)
    let own = PluginDevice("plugin \(name)") { buffer, count, offset in
      let code = read(UnsafeMutableRawPointer(bitPattern: address), buffer, count, offset)
      return code >= 0 ? code : EIO
    }
    return [given[0], given.count > 1 ? given[1] : own, own]
  }

  // MARK: Questions

  private func fail(_ code: Int32, _ what: String) -> ImageError {
    let cause = IOError(code > 0 ? code : EIO, what, "a block by plugin \(name)")
    return ImageError(.io, cause.description, cause: cause)
  }

  private func place(_ device: UInt32, _ sector: UInt64) throws(ImageError) -> Place {
    if device == UInt32(DMU_ZERO) { return .zero }
    guard Int(device) < devices?.count ?? 0, sector < 1 << 47 else {
      throw ImageError(.corrupt, "plugin \(name) names sector \(sector) of device \(device)")
    }
    return .device(UInt16(device), sector: sector)
  }

  /// The extent that a plugin answered for the blocks of a question.
  private func extent(
    _ raw: dmu_extent, of asked: BlockRange
  ) throws(ImageError) -> Extent {
    guard raw.block == asked.first, raw.count > 0 else {
      throw ImageError(
        .corrupt,
        "plugin \(name) answers blocks \(raw.block)+\(raw.count), asked for \(asked.first)")
    }
    let range = BlockRange(asked.first, min(raw.count, asked.count))
    let isStore = raw.device == UInt32(DMU_STORE)
    return Extent(
      range, try place(raw.device, raw.sector),
      writable: raw.writable != 0 && isWritable && isStore, mark: raw.mark)
  }

  /// Where a block lives.
  package func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    guard block < blocks, let find = plugin.pointee.find else {
      throw ImageError(.badRequest, "block \(block) of a disk of \(blocks) blocks")
    }
    let asked = BlockRange(block, min(max(limit, 1), blocks - block))
    var found = dmu_extent()
    let code = find(state, block, asked.count, &found)
    guard code == 0 else { throw fail(code, "find") }
    return try extent(found, of: asked)
  }

  /// A place for a first write.
  package func place(_ range: BlockRange, whole: Bool) throws(ImageError) -> Placement {
    guard isWritable else { throw fail(EROFS, "write") }
    guard let place = plugin.pointee.place else {
      let found = try find(range.first, limit: range.count)
      guard found.writable else { throw fail(EROFS, "write") }
      return Placement(found)
    }
    var placed = dmu_placement()
    let code = place(state, range.first, range.count, whole ? 1 : 0, &placed)
    guard code == 0 else { throw fail(code, "place") }
    let extent = try extent(placed.extent, of: range)
    guard extent.writable else { throw fail(EROFS, "write") }
    if extent.mark != 0 { allocatedBlocks += extent.blocks.count }
    switch placed.preparation {
    case DMU_AS_IS: return Placement(extent)
    case DMU_FILL_ZERO: return Placement(extent, .zero)
    case DMU_COPY:
      let from = try self.place(placed.from_device, placed.from_sector)
      if case .zero = from { return Placement(extent, .zero) }
      return Placement(extent, .copy(from: from))
    default: throw ImageError(.corrupt, "plugin \(name) asks for an unknown preparation")
    }
  }

  /// Zeroes what has a place, gives what must be zero one; a discard of the rest is nothing.
  package func discard(
    _ range: BlockRange, zeroing: Bool
  ) throws(ImageError) -> DiscardAnswer {
    let found = try find(range.first, limit: range.count)
    if found.writable {
      return .zero(Extent(found.blocks, found.place, writable: true))
    }
    if !zeroing || found.place == .zero { return .nothing(blocks: found.blocks.count) }
    return .zero(try place(found.blocks, whole: true).extent)
  }

  // MARK: Commit

  /// Collects a plan while the plugin makes it.
  private final class Draft {
    var stages: [[CommitPlan.Write]] = [[]]
  }

  /// The plugin's plan.
  package func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan {
    guard let make = plugin.pointee.plan else { return CommitPlan(upTo: mark, stages: []) }
    let draft = Draft()
    var plan = dmu_plan()
    plan.handle = Unmanaged.passUnretained(draft).toOpaque()
    plan.write = { plan, bytes, count, offset in
      guard let handle = plan?.pointee.handle else { return }
      let draft = Unmanaged<Draft>.fromOpaque(handle).takeUnretainedValue()
      let copy = [UInt8](UnsafeRawBufferPointer(start: bytes, count: count))
      draft.stages[draft.stages.count - 1].append(
        CommitPlan.Write(offset: offset, bytes: copy))
    }
    plan.barrier = { plan in
      guard let handle = plan?.pointee.handle else { return }
      Unmanaged<Draft>.fromOpaque(handle).takeUnretainedValue().stages.append([])
    }
    let code = withExtendedLifetime(draft) { make(state, mark, &plan) }
    guard code == 0 else { throw fail(code, "commit") }
    return CommitPlan(upTo: mark, stages: draft.stages.filter { !$0.isEmpty })
  }

  /// The plan has run.
  package func committed(upTo mark: Mark) { plugin.pointee.committed?(state, mark) }
  /// A placement came to nothing.
  package func abandon(_ mark: Mark) { plugin.pointee.abandon?(state, mark) }

  /// Hands the placements of a former worker on; throws `badRequest` when the plugin takes none.
  package func restore(_ extents: [Extent]) throws(ImageError) {
    guard !extents.isEmpty else { return }
    guard let restore = plugin.pointee.restore else {
      throw ImageError(.badRequest, "plugin \(name) cannot take up uncommitted placements")
    }
    let raw = extents.map { extent in
      var raw = dmu_extent()
      raw.block = extent.blocks.first
      raw.count = extent.blocks.count
      raw.device = UInt32(DMU_ZERO)
      if case .device(let device, let sector) = extent.place {
        raw.device = UInt32(device)
        raw.sector = sector
      }
      raw.writable = extent.writable ? 1 : 0
      raw.mark = extent.mark
      return raw
    }
    let code = restore(state, raw, raw.count)
    guard code == 0 else { throw fail(code, "restore") }
  }
}
