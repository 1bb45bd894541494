// SPDX-License-Identifier: Apache-2.0
// Lines of the matrix for the formats other than qcow2.

import BlockIO
import DiskFormats
import Foundation
import TestSupport

/// A kind of image that qemu-img makes.
struct FormatCase: MatrixRow {
  var format: String
  var name: String
  var options = ""
  /// The format of the base.
  var base: String?
  var size = 5 << 20
  /// How a model is made into an image, where qemu-io is not enough: compressed.
  var converts = false
  var isReadOnly = false

  static let all: [FormatCase] = {
    var cases = [
      FormatCase(format: "raw", name: "raw"),
      FormatCase(format: "raw", name: "raw, odd size", size: (3 << 20) + 512 * 77),
      FormatCase(format: "qcow", name: "plain"),
      FormatCase(format: "qcow", name: "odd size", size: (3 << 20) + 512 * 77),
      FormatCase(format: "qcow", name: "base raw", base: "raw"),
      FormatCase(format: "qcow", name: "base qcow", base: "qcow"),
      FormatCase(format: "qcow", name: "base qcow2", base: "qcow2"),
      FormatCase(format: "qcow", name: "compressed", converts: true),
      FormatCase(format: "vpc", name: "dynamic", options: "subformat=dynamic"),
      FormatCase(format: "vpc", name: "fixed", options: "subformat=fixed"),
      FormatCase(
        format: "vpc", name: "dynamic, force_size", options: "subformat=dynamic,force_size=on"),
      FormatCase(
        format: "vpc", name: "fixed, force_size", options: "subformat=fixed,force_size=on"),
    ]
    for subformat in VmdkSubformat.allCases where subformat != .streamOptimized {
      let options = "subformat=\(subformat.rawValue)"
      cases.append(FormatCase(format: "vmdk", name: subformat.rawValue, options: options))
      cases.append(
        FormatCase(
          format: "vmdk", name: subformat.rawValue + ", odd size", options: options,
          size: (3 << 20) + 512 * 77))
    }
    for name in ["monolithicSparse", "twoGbMaxExtentSparse"] {
      cases.append(
        FormatCase(
          format: "vmdk", name: name + " over vmdk", options: "subformat=" + name, base: "vmdk"))
    }
    let zeroes = "subformat=monolithicSparse,zeroed_grain=on"
    cases.append(FormatCase(format: "vmdk", name: "zeroed grains", options: zeroes))
    cases.append(
      FormatCase(
        format: "vmdk", name: "streamOptimized", options: "subformat=streamOptimized",
        converts: true, isReadOnly: true))
    return cases
  }()

  var kind: ImageKind { FormatList.all.named(format) ?? .raw }

  /// Has QEMU make the image.
  private func make(_ judge: Judge, _ random: inout SplitMix64) throws {
    var arguments = ["create", "-q", "-f", format]
    if !options.isEmpty { arguments += ["-o", options] }
    if let base {
      let least = format == "vmdk" ? size : size * 3 / 4 / 512 * 512
      try judge.must("qemu-img", "create", "-q", "-f", base, "base.img", "\(least)")
      try judge.io("base.img", base, requests(&random, size: least, count: 12))
      arguments += ["-b", "base.img", "-F", base]
    }
    guard converts else {
      let (output, status) = try judge.run("qemu-img", arguments + ["disk.img", "\(size)"])
      guard status == 0 else { throw Judge.Failure(description: output) }
      return try judge.io("disk.img", format, requests(&random, size: size, count: 14))
    }
    try judge.must("qemu-img", "create", "-q", "-f", "raw", "in.raw", "\(size)")
    try judge.io("in.raw", "raw", requests(&random, size: size, count: 14))
    var convert = ["convert", "-f", "raw", "-O", format] + (format == "qcow" ? ["-c"] : [])
    if !options.isEmpty { convert += ["-o", options] }
    // qemu-img 7.2 writes all of a qcow and then fails on an empty write that ends the image:
    // what counts is what is in it.
    _ = try judge.run("qemu-img", convert + ["in.raw", "disk.img"])
    try judge.must(
      "qemu-img", "compare", "-q", "-f", "raw", "-F", format, "in.raw", "disk.img")
  }

  private func requests(_ random: inout SplitMix64, size: Int, count: Int) -> [String] {
    (0..<count).map { index in
      let first = random.below(size / 512)
      let length = min(size / 512 - first, 1 + random.below(900))
      let what = random.chance(12) ? "write -z" : "write -P \(1 + index * 17 % 250)"
      return "\(what) \(first * 512) \(length * 512)"
    }
  }

  /// QEMU and this program find the image clean and equal to the model.
  private func judge(_ judge: Judge, _ model: [UInt8]) throws {
    if format == "vmdk" { try judge.must("qemu-img", "check", "-q", "-f", format, "disk.img") }
    // What QEMU makes of a fixed VHD's length without force_size is its own affair.
    try judge.compare("disk.img", format, with: model)
    let store = try judge.open("disk.img", writable: false)
    let report = try check(judge, store)
    guard report.corruptions == 0 else {
      throw Judge.Failure(description: "our check: \(report.problems)")
    }
    let engine = DeviceEngine(try judge.chain(store, kind: kind, writable: false), store: store)
    guard try engine.read(0, count: engine.sectors) == model else {
      throw Judge.Failure(description: "opened again it reads otherwise")
    }
  }

  private func check(_ judge: Judge, _ store: FileStore) throws -> CheckReport {
    switch kind {
    case .qcow: return try Qcow.check(store: store)
    case .vhd: return try Vhd.check(store: store)
    case .vmdk:
      let extents = try VmdkLayout.read(from: store).extentPaths.map {
        try judge.open($0, writable: false)
      }
      return try Vmdk.check(store: store, extents: extents)
    default: return CheckReport()
    }
  }

  func live(seed: UInt64) throws -> String {
    let judge = try Judge()
    var random = SplitMix64(seed: seed)
    try make(judge, &random)
    let before = try judge.contents("disk.img", format)
    guard !isReadOnly else {
      try self.judge(judge, before)
      return "-"
    }
    let store = try judge.open("disk.img", writable: true)
    var engine = DeviceEngine(try judge.chain(store, kind: kind, writable: true), store: store)
    guard try engine.read(0, count: engine.sectors) == before else {
      throw Judge.Failure(description: "it reads otherwise than in QEMU")
    }
    var model = try VhdTests.live(engine, before, seed: seed, steps: 80)
    // A worker dies with placements that are not committed.
    let data = [UInt8](repeating: 0x5A, count: 512 * 9)
    for sector in [40, engine.sectors / 2, engine.sectors - 9] {
      try engine.write(sector, data)
      model.replaceSubrange((sector * 512)..<(sector * 512 + data.count), with: data)
    }
    let left = engine.uncommitted
    let format = try judge.chain(store, kind: kind, writable: true)
    try format.restore(left)
    engine = DeviceEngine(format, store: store)
    engine.takeOver(left)
    try engine.flush()
    try self.judge(judge, model)
    return try resize(judge, store, model, &random)
  }

  /// Gives the disk other lengths, and writes to its new end.
  private func resize(
    _ judge: Judge, _ store: FileStore, _ before: [UInt8], _ random: inout SplitMix64
  ) throws -> String {
    var model = before
    for _ in 0..<3 {
      let format = try judge.chain(store, kind: kind, writable: true)
      let size = (model.count / 2 + random.below(model.count)) / 512 * 512
      switch format {
      case let format as Qcow: try format.resize(to: UInt64(size))
      case let format as Vhd: try format.resize(to: UInt64(size))
      case let format as Vmdk: try format.resize(to: UInt64(size))
      default: return "-"
      }
      model =
        size < model.count
        ? [UInt8](model[..<size])
        : model + [UInt8](repeating: 0, count: size - model.count)
      let engine = DeviceEngine(
        try judge.chain(store, kind: kind, writable: true), store: store)
      guard try engine.read(0, count: engine.sectors) == model else {
        throw Judge.Failure(description: "resized to \(size) it reads otherwise")
      }
      let data = [UInt8](repeating: 0xA5, count: 512 * 3)
      try engine.write(size / 512 - 3, data)
      model.replaceSubrange((size - 512 * 3)..., with: data)
      try engine.flush()
    }
    try self.judge(judge, model)
    return "equal"
  }
}
