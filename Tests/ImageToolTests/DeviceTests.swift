// SPDX-License-Identifier: Apache-2.0
// dmu-img onto block devices that hold something else, with sectors of 512 and 4096 bytes: what is
// made there reads as its source, or as zeroes, in every byte, here and by QEMU.

import BlockIO
import DiskFormats
import Foundation
import LinuxBlock
import SystemIO
import Testing
import TestSupport

@Suite(.serialized, .enabled(if: geteuid() == 0, "loop devices need root"))
struct DeviceTests {
  /// A way to make an image.
  struct Way: CustomTestStringConvertible, Equatable, Sendable {
    var format: String
    var options: [String] = []
    var testDescription: String { ([format] + options).joined(separator: " ") }

    init(_ format: String, _ options: String...) {
      self.format = format
      self.options = options
    }

    static let preallocated = ["metadata", "falloc", "full"].map {
      Way("qcow2", "-o", "preallocation=\($0)")
    }
    static let created: [Way] =
      preallocated + [
        Way("qcow2"), Way("qcow2", "-o", "cluster_size=512"), Way("qcow2", "-o", "compat=0.10"),
        Way("qcow"), Way("vpc"), Way("vmdk"), Way("dscow"),
      ]
    static let converted: [Way] =
      created + [
        Way("qcow2", "-c"), Way("qcow2", "-S", "0"), Way("qcow2", "-o", "cluster_size=2M"),
        Way("qcow2", "-o", "extended_l2=on,cluster_size=128k"),
        Way("vpc", "-o", "block_size=65536"), Way("vmdk", "-o", "subformat=streamOptimized"),
        Way("dscow", "-o", "block_size=65536"), Way("dscow", "-B", "raw"),
        Way("qcow2", "-B", "raw"), Way("vpc", "-B", "vpc"), Way("vmdk", "-B", "vmdk"),
        Way("qcow", "-B", "raw"),
      ]
    static let raw = [
      Way("raw"), Way("raw", "-S", "0"), Way("raw", "-n"), Way("raw", "-o", "preallocation=falloc"),
      Way("raw", "-o", "preallocation=full"),
    ]
  }

  /// A device full of noise.
  private struct Device: ~Copyable {
    static let size = 16 << 20
    static let noise: Data = {
      var random = SplitMix64(seed: 16)
      let words = (0..<(size / 8)).map { _ in random.next() }
      return words.withUnsafeBytes { Data($0) }
    }()
    let loop: LoopDevice
    var path: String { loop.path }

    init(_ bench: Bench, sector: Int) throws {
      let file = try FileStore(
        Descriptor(path: bench.path("device"), flags: O_RDWR | O_CREAT | O_TRUNC, mode: 0o600),
        name: "device")
      try Self.noise.withUnsafeBytes { try file.write($0, at: 0) }
      let made = try LoopDevice(
        file: file.raw, name: "device", readOnly: false, direct: false, sector: UInt32(sector))
      #expect(try made.sectorSize() == UInt32(sector))
      loop = made
    }

    /// What it holds.
    func bytes() throws -> Data {
      Data(try FileStore(path: path, writable: false).read(at: 0, count: Self.size))
    }
  }

  /// Lengths within a sector of 4096 bytes, within a cluster, and of whole ones.
  private static let sizes = [
    (3 << 20) + 512 * 77, 512 * 5, 4 << 20, (1 << 20) + 12288 + 1536, 512,
  ]

  /// Some of them, others for every way and sector: all with DMU_DEPTH=5.
  private static func sizes(_ ways: [Way], _ way: Way, _ sector: Int) -> [Int] {
    let first = (ways.firstIndex(of: way) ?? 0) + sector / 4096
    return (0..<min(sizes.count, Depth.factor)).map { sizes[(first + $0) % sizes.count] }
  }

  /// What is on the device shows what a file holds.
  private static func judge(
    _ bench: Bench, _ path: String, _ way: Way, shows file: String, _ words: String
  ) throws {
    func must(_ program: String, _ arguments: String...) throws {
      let outcome = try bench.run(program, arguments)
      #expect(outcome.exit == 0, "\(words): \(program) \(arguments): \(outcome)")
    }
    try must("dmu-img", "compare", "-f", "raw", file, "-F", way.format, path)
    try must("dmu-img", "check", "-q", "-f", way.format, path)
    // QEMU has no dscow, and no VHD with a base.
    guard way.format != "dscow", way != Way("vpc", "-B", "vpc") else { return }
    try must("qemu-img", "compare", "-f", "raw", file, "-F", way.format, path)
    guard way.format == "qcow2" || way.format == "vmdk" else { return }
    try must("qemu-img", "check", "-q", "-f", way.format, path)
  }

  @Test(arguments: [512, 4096], Way.converted) func convert(sector: Int, way: Way) throws {
    let bench = try Bench()
    for size in Self.sizes(Way.converted, way, sector) {
      try bench.makeRaw("source", size: size, seed: UInt64(size))
      // Something to the last byte.
      let file = try FileStore(path: bench.path("source"), writable: true)
      try file.write([1, 2, 3], at: UInt64(size - 3))
      var options = way.options
      if let at = options.firstIndex(of: "-B") {
        let format = options[at + 1]
        try bench.makeRaw("base.raw", size: size, seed: 4)
        try bench.must("dmu-img", "convert", "-f", "raw", "-O", format, "base.raw", "base")
        options[(at + 1)...] = [bench.path("base"), "-F", format]
      }
      let device = try Device(bench, sector: sector)
      let made = try bench.run(
        "dmu-img", ["convert", "-f", "raw", "-O", way.format] + options + ["source", device.path])
      #expect(made.exit == 0, "\(made.error)")
      try Self.judge(bench, device.path, way, shows: "source", "\(size) bytes")
    }
  }

  @Test(arguments: [512, 4096], Way.created) func create(sector: Int, way: Way) throws {
    let bench = try Bench()
    for size in Self.sizes(Way.created, way, sector) {
      try bench.must("rm", "-f", "zeroes")
      try bench.must("truncate", "-s", "\(size)", "zeroes")
      try bench.makeRaw("source", size: size, seed: UInt64(size))
      let device = try Device(bench, sector: sector)
      let made = try bench.run(
        "dmu-img", ["create", "-q", "-f", way.format] + way.options + [device.path, "\(size)"])
      #expect(made.exit == 0, "\(made.error)")
      try Self.judge(bench, device.path, way, shows: "zeroes", "\(size) bytes, empty")
      try bench.must(
        "dmu-img", "convert", "-n", "-f", "raw", "-O", way.format, "source", device.path)
      try Self.judge(bench, device.path, way, shows: "source", "\(size) bytes, filled")
    }
  }

  /// A raw disk has the device's first bytes; the others stay as they are, as with qemu-img.
  @Test(arguments: [512, 4096], Way.raw) func convertToRaw(sector: Int, way: Way) throws {
    let bench = try Bench()
    for size in Self.sizes {
      try bench.makeRaw("source", size: size, seed: UInt64(size))
      let device = try Device(bench, sector: sector)
      let made = try bench.run(
        "dmu-img", ["convert", "-f", "raw", "-O", "raw"] + way.options + ["source", device.path])
      #expect(made.exit == 0, "\(made.error)")
      let whole = try device.bytes()
      #expect(try whole[..<size] == Data(bench.bytes("source")), "\(size) bytes")
      #expect(whole[size...] == Device.noise[size...], "behind \(size) bytes")
      guard way.options.isEmpty else { continue }
      // Told that it is zeroes, it is written where there is data, and nowhere else.
      try bench.must("dd", "if=/dev/zero", "of=\(device.path)", "bs=1M", "count=16", "status=none")
      try bench.must(
        "dmu-img", "convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw", "source",
        device.path)
      try bench.must("qemu-img", "compare", "-f", "raw", "-F", "raw", "source", device.path)
    }
  }

  /// A raw disk that is made has no trace of what looked like an image, and zeroes where they are
  /// asked for.
  @Test(arguments: [512, 4096]) func createRaw(sector: Int) throws {
    let bench = try Bench()
    for size in Self.sizes {
      let device = try Device(bench, sector: sector)
      try bench.must("dmu-img", "create", "-q", "-f", "raw", device.path, "\(size)")
      let whole = try device.bytes()
      #expect(whole[..<512] == Data(count: 512))
      #expect(whole[512...] == Device.noise[512...])
      for how in ["falloc", "full"] {
        let device = try Device(bench, sector: sector)
        try bench.must(
          "dmu-img", "create", "-q", "-f", "raw", "-o", "preallocation=\(how)", device.path,
          "\(size)")
        let whole = try device.bytes()
        #expect(whole[..<size] == Data(count: size), "\(how), \(size) bytes")
        #expect(whole[size...] == Device.noise[size...], "\(how), behind \(size) bytes")
      }
    }
  }

  /// A device, or a file that was there, as the data file of a qcow2 image.
  @Test(arguments: [
    "data_file_raw=off", "data_file_raw=on", "preallocation=metadata", "preallocation=falloc",
    "preallocation=full", "data_file_raw=on,preallocation=metadata",
  ]) func dataFile(options: String) throws {
    let bench = try Bench()
    let way = Way("qcow2")
    let size = Self.sizes[0]
    try bench.makeRaw("source", size: size, seed: 13)
    try bench.must("truncate", "-s", "\(size)", "zeroes")
    for isDevice in [true, false] {
      func data(_ device: borrowing Device) throws -> String {
        guard !isDevice else { return device.path }
        try Device.noise.write(to: URL(fileURLWithPath: bench.path("data")))
        return "data"
      }
      let device = try Device(bench, sector: 512)
      let named = "data_file=\(try data(device)),\(options)"
      try bench.must(
        "dmu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", named, "source", "converted")
      try Self.judge(bench, "converted", way, shows: "source", named)
      let other = try Device(bench, sector: 4096)
      let again = "data_file=\(try data(other)),\(options)"
      try bench.must("dmu-img", "create", "-q", "-f", "qcow2", "-o", again, "made", "\(size)")
      try Self.judge(bench, "made", way, shows: "zeroes", again)
    }
  }

  /// What does not fit is refused with its reason, and the device is as it was.
  @Test func tooShort() throws {
    let bench = try Bench()
    let size = Device.size + 512
    try bench.makeRaw("source", size: size, seed: 14)
    let device = try Device(bench, sector: 512)
    for arguments in [
      ["create", "-f", "raw", device.path, "\(size)"],
      ["convert", "-f", "raw", "-O", "raw", "source", device.path],
      ["convert", "-n", "-f", "raw", "-O", "raw", "source", device.path],
      ["create", "-f", "vpc", "-o", "subformat=fixed", device.path, "\(size)"],
      ["create", "-f", "vpc", "-o", "subformat=fixed", device.path, "4M"],
    ] {
      let outcome = try bench.run("dmu-img", arguments)
      #expect(outcome.exit == 1 && outcome.error.contains("device"), "\(arguments): \(outcome)")
    }
    #expect(try device.bytes() == Device.noise)
    // A fixed VHD image that fills it.
    let way = Way("vpc", "-o", "subformat=fixed")
    try bench.makeRaw("fits", size: Device.size - 512, seed: 15)
    try bench.must(
      "dmu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed", "fits", device.path)
    try Self.judge(bench, device.path, way, shows: "fits", "fixed")
  }
}
