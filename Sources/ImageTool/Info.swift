// SPDX-License-Identifier: Apache-2.0
// dmu-img info and check: an image in words or as JSON, by the names that qemu-img has.

import BlockIO
package import DiskFormats
package import SystemIO

extension ImageTool {
  /// Describes an image, or with `chain` every image from it down.
  package static func info(
    _ source: ImageSource, chain: Bool, json: Bool, to output: Output
  ) throws(ImageError) {
    var images: [Described] = []
    var next: ImageSource? = source
    while let current = next {
      guard images.count < Chain.usualDepth else {
        throw ImageError(
          .unsupported,
          "more than \(Chain.usualDepth) images in a row, down to \(current.path)")
      }
      let image = try describe(current)
      images.append(image)
      next = chain ? try image.base(current, source.evenInUse) : nil
    }
    if json {
      let values = images.map(\.json)
      output.put((chain ? JSON.array(values) : values[0]).indented + "\n")
      return
    }
    for (number, image) in images.enumerated() {
      if number > 0 { output.put("\n") }
      image.put(to: output)
    }
  }

  /// An image and what there is to say of it.
  private struct Described {
    var path: String
    var store: FileStore
    var decision: FormatDecision
    var info: ImageInfo
    var allocated: UInt64
    var snapshots: [Qcow2Snapshot]

    /// The image under it.
    func base(_ source: ImageSource, _ evenInUse: Bool) throws(ImageError) -> ImageSource? {
      guard let base = info.basePath else { return nil }
      try decision.checkMayName(base, store)
      guard !source.untrusted else {
        throw NamedFile(role: .base, path: base, from: path).refusal
      }
      var below = ImageSource(
        ImageSource.beside(path, base), format: source.baseFormat ?? info.baseFormat,
        evenInUse: evenInUse)
      below.formats = source.formats
      return below
    }

    /// What only this format has to say.
    private var details: [(name: String, value: String)] {
      info.details.filter { !$0.name.hasPrefix("snapshot ") }
    }

    func put(to output: Output) {
      output.put("image: \(path)\nfile format: \(info.format)\n")
      output.put("virtual size: \(Words.size(info.size)) (\(info.size) bytes)\n")
      output.put("disk size: \(Words.size(allocated))\n")
      if info.clusterSize > 0 { output.put("cluster_size: \(info.clusterSize)\n") }
      if let base = info.basePath {
        let real = ImageSource.beside(path, base)
        output.put("backing file: \(base)")
        output.put(real == base ? "\n" : " (actual path: \(real))\n")
      }
      if let format = info.baseFormat { output.put("backing file format: \(format)\n") }
      if !snapshots.isEmpty {
        output.put("Snapshot list:\n")
        ImageTool.put(snapshots, to: output)
      }
      guard !details.isEmpty else { return }
      output.put("Format specific information:\n")
      for (name, value) in details { output.put("    \(name): \(value)\n") }
    }

    var json: JSON {
      var members: [(String, JSON)] = [
        ("virtual-size", .number(info.size)), ("filename", .string(path)),
      ]
      if info.clusterSize > 0 { members.append(("cluster-size", .number(info.clusterSize))) }
      members.append(("format", .string(info.format)))
      members.append(("actual-size", .number(allocated)))
      if !details.isEmpty {
        let data = details.map { name, value in
          (String(name.map { $0 == " " ? "-" : $0 }), Self.typed(value))
        }
        members.append(
          (
            "format-specific",
            .object([("type", .string(info.format)), ("data", .object(data))])
          ))
      }
      if let base = info.basePath {
        members.append(("full-backing-filename", .string(ImageSource.beside(path, base))))
        members.append(("backing-filename", .string(base)))
      }
      if let format = info.baseFormat {
        members.append(("backing-filename-format", .string(format)))
      }
      if !snapshots.isEmpty {
        members.append(("snapshots", .array(snapshots.map(ImageTool.snapshot))))
      }
      members.append(("dirty-flag", .bool(info.details.contains { $0.name == "closed" })))
      return .object(members)
    }

    private static func typed(_ value: String) -> JSON {
      switch value {
      case "true": .bool(true)
      case "false": .bool(false)
      default: UInt64(value).map { .number($0) } ?? .string(value)
      }
    }
  }

  private static func describe(_ source: ImageSource) throws(ImageError) -> Described {
    let store = try source.open()
    let decision = try source.decision(of: store)
    let allocated = try toolIO { () throws(IOError) in try store.allocatedBytes() }
    return Described(
      path: source.path, store: store, decision: decision,
      info: try decision.kind.format.info(of: store), allocated: allocated,
      snapshots: try decision.kind.format.snapshots(of: store))
  }

  /// How a check ends.
  package enum CheckExit: Int32, Sendable {
    /// The image is sound.
    case clean = 0
    /// The check could not be done.
    case failed = 1
    /// Something is wrong that may cost data.
    case corrupt = 2
    /// Space is counted and not used.
    case leaks = 3
    /// There is nothing to check in such an image.
    case unsupported = 63
  }

  /// Checks an image, and mends it as far as is asked.
  package static func check(
    _ source: ImageSource, repair: Repair?, json: Bool, quiet: Bool, to output: Output
  ) throws(ImageError) -> CheckExit {
    let store = try source.open(writable: repair != nil)
    let decision = try source.decision(of: store)
    let kind = decision.kind
    func check(_ repair: Repair?) throws(ImageError) -> CheckReport? {
      try Kinds.check(store, decision, repair: repair, untrusted: source.untrusted)
    }
    guard var report = try check(repair) else {
      throw ImageError(
        .unsupported, "\(source.path): a \(kind.name) image has nothing to check")
    }
    let found = report
    if repair != nil, report.repaired > 0 {
      guard let again = try check(nil) else { return .failed }
      report = again
    }
    if json {
      output.put(checkJSON(source.path, kind, report, found).indented + "\n")
    } else if !quiet {
      put(report, found, to: output)
    }
    return report.corruptions > 0 ? .corrupt : report.leaks > 0 ? .leaks : .clean
  }

  private static func put(
    _ report: CheckReport, _ found: CheckReport, to output: Output
  ) {
    if found.repaired > 0 {
      for problem in found.problems { output.put("\(problem)\n") }
      output.put(
        "\(found.repaired) of \(found.leaks) leaks and \(found.corruptions) errors were repaired; "
          + "checked again:\n\n")
    }
    for problem in report.problems { output.put("\(problem)\n") }
    let total = report.leaks + report.corruptions
    if total > UInt64(report.problems.count) {
      output.put("... and \(total - UInt64(report.problems.count)) more\n")
    }
    if report.isClean { output.put("No errors were found on the image.\n") }
    if report.corruptions > 0 {
      output.put(
        "\n\(report.corruptions) errors were found on the image.\nData may be corrupted, or "
          + "further writes to the image may corrupt it.\n")
    }
    if report.leaks > 0 {
      output.put(
        "\n\(report.leaks) leaked clusters were found on the image.\nThis means waste of disk "
          + "space, but no harm to data.\n")
    }
    if report.totalClusters > 0 {
      func percent(_ part: UInt64, _ whole: UInt64) -> String {
        Words.fixed(whole == 0 ? 0 : Double(part) * 100 / Double(whole), places: 2) + "%"
      }
      output.put(
        "\(report.allocatedClusters)/\(report.totalClusters) = "
          + "\(percent(report.allocatedClusters, report.totalClusters)) allocated, "
          + "\(percent(report.fragmentedClusters, report.allocatedClusters)) fragmented, "
          + "\(percent(report.compressedClusters, report.allocatedClusters)) compressed clusters\n")
    }
    if report.imageEnd > 0 { output.put("Image end offset: \(report.imageEnd)\n") }
  }

  private static func checkJSON(
    _ path: String, _ kind: ImageKind, _ report: CheckReport, _ found: CheckReport
  ) -> JSON {
    var members: [(String, JSON)] = [("image-end-offset", .number(report.imageEnd))]
    func add(_ name: String, _ number: UInt64) {
      if number > 0 { members.append((name, .number(number))) }
    }
    add("total-clusters", report.totalClusters)
    members.append(("check-errors", .number(0)))
    add("allocated-clusters", report.allocatedClusters)
    add("fragmented-clusters", report.fragmentedClusters)
    add("compressed-clusters", report.compressedClusters)
    add("corruptions", report.corruptions)
    add("leaks", report.leaks)
    add("corruptions-fixed", found.corruptions - min(found.corruptions, report.corruptions))
    add("leaks-fixed", found.leaks - min(found.leaks, report.leaks))
    members.append(("filename", .string(path)))
    members.append(("format", .string(kind.name)))
    if !report.problems.isEmpty {
      members.append(("problems", .array(report.problems.map { .string($0) })))
    }
    return .object(members)
  }
}
