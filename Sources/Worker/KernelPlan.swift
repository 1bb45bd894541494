// SPDX-License-Identifier: Apache-2.0
// What the kernel is given of an image: on which files a device of the target `userspace`
// stands, in which order, and how it may read and write them.
//
// Invariants:
// - The plan follows from the image alone, so that a later worker makes the same one.
// - What may be written is known to the kernel; of what is only read as much as there are
//   numbers for, and the rest is read through user space.
// - The store is among the files, so that its lock lasts as long as the device.

import BlockIO
import DiskFormats
import LinuxBlock
import SystemIO
import Target
import WorkerLink

/// The files of a device, and what of an image they are.
struct KernelPlan {
  /// A plan, or why there is none.
  enum Outcome {
    case plan(KernelPlan)
    case hindrance(String)
  }

  /// A file, by the kernel's number.
  struct File {
    let store: FileStore
    let isWritable: Bool
    /// Whether the page cache may be passed by.
    let isDirect: Bool
  }

  /// The most files that a device has. Source: DMU_MAX_DEVICES.
  static let mostFiles = DiskPart.most

  /// The files, by the kernel's numbers.
  let files: [File]
  /// How the format's devices are to be found among them.
  let devices: KernelDevices
  /// By how many bytes a file may grow.
  private let growth: UInt64

  /// Makes the plan of an image.
  static func make(_ image: OpenImage) -> Outcome {
    var files: [File] = []
    func add(_ store: any ByteStore, writable: Bool, _ device: Int) {
      guard let file = store.file, !files.contains(where: { $0.store === file }),
        (file.isWritable && !image.readOnly) == writable
      else { return }
      files.append(
        File(store: file, isWritable: writable, isDirect: isDirect(file, device, image)))
    }
    for writable in [true, false] {
      for (number, device) in image.devices.enumerated() {
        for part in parts(of: device) { add(part, writable: writable, number) }
      }
      if writable, files.count > mostFiles {
        return .hindrance("is written in more than \(mostFiles) files")
      }
      add(image.store, writable: writable, 0)
    }
    return .plan(KernelPlan(image, Array(files.prefix(mostFiles))))
  }

  private init(_ image: OpenImage, _ files: [File]) {
    self.files = files
    growth = ServedDevice.growth(of: image.format.size)
    func number(_ store: any ByteStore) -> UInt16? {
      files.firstIndex { $0.store === store }.map { UInt16($0) }
    }
    let devices = image.devices.map { device -> (store: any ByteStore, part: KernelDevices.Part) in
      if let joined = device.joined {
        let parts = joined.parts.map { number($0.underlying) }
        return (device, .joined(parts, bits: type(of: joined).bits))
      }
      guard let number = number(device) else { return (device, .nothing) }
      let isTorn = !device.isWritable && device.size % 512 != 0
      return (device, .whole(number, torn: isTorn ? device.size / 512 : nil))
    }
    self.devices = KernelDevices(
      devices, known: files.map { KernelDevices.Known($0.store, isDirect: $0.isDirect) },
      blockSize: image.format.blockSize)
  }

  /// Has the format's own reads and writes of a file pass the page cache by where the kernel's do:
  /// the cache holds pieces larger than a page (XFS), and would write a piece back whole, over
  /// what the guest has written into a part of it. Blocks. Throws the errno of writing out.
  func separate() throws(IOError) {
    for file in files where file.isDirect && file.isWritable {
      try file.store.bypassCache(true)
    }
  }

  private static func parts(of device: any ByteStore) -> [any ByteStore] {
    (device.joined?.parts ?? [device]).map(\.underlying)
  }

  /// Whether a file may be read and written past the page cache: where all places in it are at
  /// whole pages, and nobody writes beside them.
  private static func isDirect(_ file: FileStore, _ device: Int, _ image: OpenImage) -> Bool {
    guard image.format.blockSize >= 4096, file.isBlockDevice || file.size % 4096 == 0 else {
      return false
    }
    // A base that is no image itself lies there block by block.
    if device == 1, !file.isWritable { return true }
    return image.format.isFixed && (file.isWritable || file === image.store)
  }

  /// What the device is made of.
  var backings: [ServedDevice.Backing] {
    files.map { file in
      ServedDevice.Backing(
        descriptor: file.store.raw, name: file.store.name, readOnly: !file.isWritable,
        isDirect: file.isDirect, growth: file.isDirect ? 0 : growth)
    }
  }
}
