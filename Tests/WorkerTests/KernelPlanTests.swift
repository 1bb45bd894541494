// SPDX-License-Identifier: Apache-2.0
// What the kernel would be given of an image of each kind. That it takes it is the kernel lab's
// to show (its scenario `formats`).

import BlockIO
import DiskFormats
import DiskModel
import Glibc
import SystemIO
import Target
import Testing
import TestSupport
import WorkerLink

@testable import Worker

@Suite("Plans for the kernel", .enabled(if: hasQemu), .serialized) struct KernelPlanTests {
  private func open(_ format: String, _ path: String) throws -> OpenImage {
    let store = try FileStore(path: path, writable: true)
    return try OpenImage(try FormatName(named: format), store: store, ImageRequest()) {
      file throws(ImageError) in
      do throws(IOError) { return try FileStore(path: file.path, writable: file.writable) } catch {
        throw ImageError(error)
      }
    }
  }

  private func plan(_ format: String, _ path: String) throws -> (OpenImage, KernelPlan) {
    let image = try open(format, path)
    guard case .plan(let plan) = KernelPlan.make(image) else {
      Issue.record("the kernel cannot serve \(path)")
      throw WorkerError(.unsupported, path)
    }
    return (image, plan)
  }

  @Test(arguments: MadeStore.allCases) func everyFormatHasOne(_ kind: MadeStore) throws {
    let image = try TestImage(sectors: 8192, blockSize: 65536, create: false)
    let (opened, plan) = try plan(kind.format, try kind.make(image))
    // What is written comes first, and the store is held whatever is in it.
    let writable = plan.files.prefix { $0.isWritable }
    #expect(plan.files.dropFirst(writable.count).allSatisfy { !$0.isWritable })
    #expect(plan.files.contains { $0.store === opened.store })
    #expect(plan.devices.translate(.device(0, sector: 64), blocks: 1).place != nil)
    let isDirect = plan.files.filter(\.isWritable).contains(where: \.isDirect)
    #expect(isDirect == [.raw, .dscow, .flatVMDK].contains(kind))
    for (number, device) in opened.devices.enumerated() {
      let place = Place.device(UInt16(number), sector: 64)
      let found = plan.devices.translate(place, blocks: 1).place
      guard let file = device as? FileStore else {
        #expect(found == nil || kind == .splitVMDK, "device \(number) is no file")
        #expect(found != nil || kind != .splitVMDK || number != 0, "its parts are files")
        continue
      }
      let index = plan.files.firstIndex { $0.store === file }
      #expect(found == index.map { .device(UInt16($0), sector: 64) })
    }
    // Who comes later plans alike.
    #expect(plan.files.map(\.store.name) == KernelPlan.names(of: opened))
  }

  @Test func whatTheKernelHasNoNumberForIsReadOtherwise() throws {
    let image = try TestImage(sectors: 8192, blockSize: 65536, create: false)
    var path = try MadeStore.overlay.make(image)
    for number in 0..<17 {
      let next = image.folder.file("link\(number)")
      try MadeStore.overlay.qemu("create", "-f", "qcow2", "-F", "qcow2", "-b", path, next)
      path = next
    }
    let (opened, plan) = try plan("qcow2", path)
    #expect(plan.files.count == KernelPlan.mostFiles)
    let unknown = opened.devices.enumerated().filter { number, device in
      let place = Place.device(UInt16(number), sector: 64)
      return device is FileStore && plan.devices.translate(place, blocks: 1).place == nil
    }
    // 19 images and the packed one below them, of which 15 are known.
    #expect(unknown.count == 4)
  }

  @Test func manyFilesThatAreWrittenAreTooMany() throws {
    let image = try TestImage(sectors: 8192, blockSize: 65536, create: false)
    var lines = ""
    for number in 0..<16 {
      lines += "RW 2048 FLAT \"part\(number)\" 0\n"
      let part = try FileStore(
        Descriptor(path: image.folder.file("part\(number)"), flags: O_RDWR | O_CREAT, mode: 0o600),
        name: "part")
      try part.resize(to: 1 << 20)
    }
    let path = image.folder.file("many.vmdk")
    try MadeStore.overlay.qemu(
      "create", "-f", "vmdk", "-o", "subformat=monolithicFlat", path, "16M")
    let text = try FileStore(path: path, writable: false)
    let old = String(decoding: try text.read(at: 0, count: Int(text.size)), as: UTF8.self)
    let kept = old.split(separator: "\n", omittingEmptySubsequences: false)
      .map { $0.hasPrefix("RW ") ? lines : String($0) }.joined(separator: "\n")
    let file = try FileStore(path: path, writable: true)
    try file.resize(to: 0)
    try file.write(Array(kept.utf8), at: 0)
    let opened = try open("vmdk", path)
    guard case .hindrance(let why) = KernelPlan.make(opened) else {
      Issue.record("16 files are written, and there are 15 numbers")
      return
    }
    #expect(why.contains("15 files"))
  }
}

extension KernelPlan {
  fileprivate static func names(of image: OpenImage) -> [String]? {
    guard case .plan(let plan) = make(image) else { return nil }
    return plan.files.map(\.store.name)
  }
}
