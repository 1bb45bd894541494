// SPDX-License-Identifier: Apache-2.0
// Why a disk cannot be served, as one sentence for the admin: the thing, the reason, the
// remedy. The words stand here and nowhere else; hotplug-error, status and log all show
// the same sentence.

import Glibc
internal import SystemIO

/// A disk that failed, and why.
package struct DiskFailure: Error, Sendable, Hashable, CustomStringConvertible {
  /// What kind of trouble; for programs.
  package enum Code: String, Sendable, Codable {
    /// The spec cannot be read.
    case malformed
    /// No worker knows the format, or one of its options.
    case format
    /// The store does not exist, and there is no base to create it from.
    case storeMissing = "store-missing"
    /// A pending log holds writes for the store, and cannot be used or is in the way.
    case pending
    /// The base does not exist, or none is known.
    case baseMissing = "base-missing"
    /// The base is not the one that the store was made from.
    case baseChanged = "base-changed"
    /// The configuration does not let an image name its base.
    case baseRefused = "base-refused"
    /// Somebody else has the store.
    case inUse = "in-use"
    /// A hook cannot attach the source that the store or base is.
    case source
    /// A system call failed.
    case io
    /// The worker reported something that has no code of its own here.
    case image
    /// The worker could not be started, or died too often.
    case worker
    /// The nbd device could not be attached.
    case device
    /// It took too long.
    case timeout
    /// The disk is not wanted (any more).
    case gone
    /// The daemon cannot be reached.
    case daemon
  }

  /// The kind.
  package let code: Code
  /// One line, no final stop, at most 1000 characters.
  package let sentence: String

  /// A failure from its parts.
  package init(_ code: Code, _ sentence: String) {
    self.code = code
    self.sentence = ForeignText.shown(sentence, limit: 1000)
  }

  /// The sentence.
  package var description: String { sentence }
}

/// A disk that holds an image, for sentences.
struct Holder: Sendable, Equatable {
  let id: DiskID
  /// Its name in the guest, if that is known by another than its number's.
  let vdev: String?

  /// "domain 5 (xvda)", "the named disk web".
  var words: String {
    guard let vbd = id.vbd, let vdev else { return id.words }
    return "domain \(vbd.domain) (\(vdev))"
  }
}

extension DiskFailure {
  static func malformed(_ error: SpecError) -> DiskFailure {
    DiskFailure(.malformed, error.description)
  }

  static func formatUnknown(_ name: String) -> DiskFailure {
    let known = KnownFormat.all.map(\.name)
    let hint = NearestMatch.hint(for: name, among: known)
    return DiskFailure(
      .format,
      "format '\(name)' is unknown: this dmu-xen has \(known.joined(separator: ", "))\(hint)")
  }

  static func optionUnknown(_ name: String, _ format: KnownFormat) -> DiskFailure {
    let known = format.options.isEmpty ? ["none"] : format.options.map(\.name)
    let hint = NearestMatch.hint(for: name, among: known)
    return DiskFailure(
      .format,
      "option '\(name)' is unknown: format \(format.name) has"
        + " \(known.joined(separator: ", "))\(hint)")
  }

  static func optionBad(_ name: String, _ value: String, wanted: String) -> DiskFailure {
    DiskFailure(.format, "option '\(name)' cannot be '\(value)': give \(wanted)")
  }

  static func storeMissing(_ path: String) -> DiskFailure {
    DiskFailure(
      .storeMissing,
      "store \(path) does not exist and the spec names no base to create it from:"
        + " correct the path, or add ':BASE' to the spec")
  }

  static func storeUnmade(_ path: String, _ format: String) -> DiskFailure {
    DiskFailure(
      .storeMissing,
      "store \(path) does not exist, and stores of format \(format) are not created here:"
        + " make it with 'qemu-img create', or use dscow or qcow2")
  }

  /// - Parameter why: why the daemon does not make it, as a part of the sentence.
  static func storeNotMade(_ spec: Spec, _ why: String) -> DiskFailure {
    DiskFailure(
      .storeMissing,
      "store \(spec.store) does not exist, and \(why): bring it back (is its file system mounted?),"
        + " or make an empty one with '\(makingCommand(spec))'")
  }

  static func storeEmpty(_ spec: Spec) -> DiskFailure {
    let remedy =
      spec.base == nil || KnownFormat.named(spec.format)?.blockSizes == nil
      ? "bring its content back"
      : "bring its content back, or make an empty disk of it with 'rm \(spec.store) &&"
        + " \(makingCommand(spec))'"
    return DiskFailure(
      .storeMissing, "store \(spec.store) is no image, it has 0 bytes: \(remedy)")
  }

  /// The command that makes the store of a spec.
  static func makingCommand(_ spec: Spec) -> String {
    let base = spec.base ?? "BASE"
    let size = spec.option("block-size")
    if spec.format == "qcow2" {
      let options = size.map { " -o cluster_size=\($0)" } ?? ""
      let baseFormat = spec.option("base-format") ?? "raw"
      return "dmu-img create -f qcow2\(options) -b \(base) -F \(baseFormat) \(spec.store)"
    }
    let block = size.flatMap { ByteCount.parse($0) }.map { " -b \($0)" } ?? ""
    return "dscow_tool -c\(block) \(spec.store) \(base)"
  }

  static func storeDirectoryMissing(_ path: String) -> DiskFailure {
    DiskFailure(
      .storeMissing,
      "store \(path) does not exist and cannot be created, since its directory does not exist:"
        + " correct the path or make the directory")
  }

  static func baseMissing(_ path: String) -> DiskFailure {
    DiskFailure(
      .baseMissing, "base \(path) does not exist: correct the path or bring the base back")
  }

  static func baseUnnamed(store: String) -> DiskFailure {
    DiskFailure(
      .baseMissing, "store \(store) names no base and the spec has none: add ':BASE' to the spec")
  }

  /// - Parameter sentence: the worker's own, which ends with a remedy.
  static func baseChanged(_ sentence: String, _ format: KnownFormat?) -> DiskFailure {
    let isForced = format?.options.contains { $0.name == "force" } ?? false
    let hint = isForced ? "; '?force=yes' in the spec uses it all the same" : ""
    return DiskFailure(.baseChanged, sentence + hint)
  }

  static func baseRefused(_ base: String, store: String, configuration: String) -> DiskFailure {
    DiskFailure(
      .baseRefused,
      "store \(store) names base \(base), which the configuration does not allow: name the base"
        + " in the spec, or add its directory to base.directories in \(configuration)")
  }

  static func fileRefused(
    _ role: String, _ path: String, store: String, configuration: String
  ) -> DiskFailure {
    DiskFailure(
      .baseRefused,
      "store \(store) names \(path) as its \(role), which the configuration does not allow to be"
        + " written: add its directory to store.directories in \(configuration)")
  }

  static func tooDeep(_ store: String, _ depth: Int) -> DiskFailure {
    DiskFailure(
      .baseRefused,
      "store \(store) names more than \(depth) images in a row: merge some, or raise"
        + " base.chain-depth")
  }

  static func tooMany(_ store: String, _ files: Int) -> DiskFailure {
    DiskFailure(.baseRefused, "store \(store) names more than \(files) files: convert it")
  }

  static func notNamedBefore(_ role: String, _ path: String, store: String) -> DiskFailure {
    DiskFailure(
      .baseRefused,
      "store \(store) names \(ForeignText.shown(path)) as its \(role), which it did not name when the"
        + " disk was started: if its images were changed on purpose, run 'dmu-xen reload', else"
        + " look at the worker's log")
  }

  static func strangeName(_ store: String) -> DiskFailure {
    DiskFailure(
      .baseRefused,
      "store \(store) names a file whose path is too long or holds control characters: rename the"
        + " file, and correct the image")
  }

  static func namesItself(_ store: String) -> DiskFailure {
    DiskFailure(
      .image, "store \(store) is, through others, its own base: bring the right base back")
  }

  static func fileInUse(_ role: String, _ path: String) -> DiskFailure {
    DiskFailure(.inUse, "\(role) \(path) is in use: end who uses it first")
  }

  /// "domain 5 (xvda)", "domains 5 (xvda) and 7 (xvdb)", "domain 5 (xvda) and the named disk web".
  static func words(_ holders: [Holder]) -> String { words(holders.map(\.words)) ?? "another disk" }

  /// The same of holders' words; nil for none.
  static func words(_ holders: [String]) -> String? {
    let prefix = "domain "
    guard holders.count > 1, holders.allSatisfy({ $0.hasPrefix(prefix) }) else {
      return list(holders)
    }
    return list(holders.map { String($0.dropFirst(prefix.count)) }).map { "domains " + $0 }
  }

  /// "one", "one and another", "one, another and a third"; nil for none.
  private static func list(_ words: [String]) -> String? {
    guard let last = words.last, words.count > 1 else { return words.first }
    return words.dropLast().joined(separator: ", ") + " and " + last
  }

  static func inUse(_ store: String, by holders: [Holder]) -> DiskFailure {
    DiskFailure(
      .inUse,
      "store \(store) is in use by \(words(holders)): detach it there first,"
        + " or give this disk a store of its own")
  }

  /// - Parameter programs: "qemu-img (process 77)"; empty when they could not be found.
  static func inUseElsewhere(
    _ role: SpecError.Role, _ path: String, _ programs: [String]
  ) -> DiskFailure {
    let who = programs.isEmpty ? "another program" : programs.joined(separator: ", ")
    return DiskFailure(
      .inUse, "\(role.rawValue) \(path) is in use by \(who): end that program first")
  }

  static func storeIsBase(_ path: String, of holders: [Holder]) -> DiskFailure {
    DiskFailure(
      .inUse,
      "store \(path) is in use by \(words(holders)) as a base: give this disk a store of its own")
  }

  static func sameStoreTwice(_ path: String, _ holders: [Holder]) -> DiskFailure {
    DiskFailure(
      .inUse,
      "base \(path) is in use as the store of"
        + " \(words(holders)): give this disk another base")
  }

  /// - Parameter held: what the log holds, in words.
  static func pendingOfAnother(_ store: String, _ held: String) -> DiskFailure {
    DiskFailure(
      .pending,
      "store \(store) is another file than the one that a pending log is kept for (\(held)): bring"
        + " the former file back, or give its writes up with 'dmu-xen discard-pending \(store)'")
  }

  static func pendingOfFormat(_ store: String, _ format: String, _ held: String) -> DiskFailure {
    DiskFailure(
      .pending,
      "store \(store) has writes of a disk of format \(format) that are not in it yet (\(held)):"
        + " run 'dmu-xen recover \(store)' first")
  }

  static func pendingStale(_ store: String) -> DiskFailure {
    DiskFailure(
      .pending,
      "store \(store) was changed by another program since its pending log was written: bring the"
        + " former store back, or give up the writes of the log with"
        + " 'dmu-xen discard-pending \(store)'")
  }

  static func pendingDamaged(_ store: String, _ message: String) -> DiskFailure {
    DiskFailure(
      .pending,
      "the pending log of store \(store) is damaged (\(message)): give up its writes with"
        + " 'dmu-xen discard-pending \(store)'")
  }

  static func timeout(_ what: String, _ limit: Duration, remedy: String) -> DiskFailure {
    DiskFailure(.timeout, "\(what) within \(limit.components.seconds) seconds: \(remedy)")
  }

  static func device(_ error: IOError) -> DiskFailure {
    let remedy =
      switch error.code {
      case ENOENT: "load the nbd driver (modprobe nbd)"
      case EPERM, EACCES: "dmu-xend has to run as root"
      default: "look at the kernel's log (dmesg)"
      }
    return DiskFailure(.device, "\(error.description): \(remedy)")
  }

  static func worker(_ what: String) -> DiskFailure { DiskFailure(.worker, what) }

  static let daemonNotRunning = DiskFailure(
    .daemon,
    "dmu-xend is not running: start it (systemctl start dmu-xend)")

  /// Nobody wants a disk for which somebody waits.
  static func unwanted(_ id: DiskID) -> DiskFailure {
    switch id {
    case .vbd(let vbd), .again(let vbd, _):
      DiskFailure(
        .gone,
        "xenstore has no dmu disk that is wanted at \(vbd.backendPath): attach the disk anew")
    case .named(let name):
      DiskFailure(
        .gone, "the disk \(name) was detached while it was being attached: attach it anew")
    }
  }

  static let gone = DiskFailure(
    .gone, "the disk was detached while it was being started: attach it again if it is wanted")
}
