// SPDX-License-Identifier: Apache-2.0
// Attaches that failed: they stay in status, with the sentence and the time, until the same
// disk is tried again or an admin has them forgotten. The next daemon finds them in a file.

internal import FoundationEssentials
import Glibc
internal import Logging
internal import SystemIO
internal import XenStore

extension Reconciler {
  /// The most that are remembered; the oldest go first.
  private static let mostFailures = 100

  private var failuresPath: String { configuration.runDirectory + "/failed" }

  /// Reads a disk's domain's name while there is one.
  func learnName(of disk: Disk) async {
    guard let domain = disk.id.vbd?.domain, !disk.isOutlived else { return }
    do throws(XenStoreError) {
      if let name = try await view.name(of: domain) { disk.domainName = name }
    } catch {
      log(for: disk).warning("cannot read the domain's name", metadata: ["error": "\(error)"])
    }
  }

  /// Keeps what is known of a disk that has failed and goes.
  func rememberFailure(of disk: Disk) {
    guard case .failed(let failure, attached: false) = disk.phase else { return }
    var status = DiskStatus(
      disk.id, vdev: disk.vdev, state: .failed, since: disk.since, readOnly: disk.readOnly)
    status.domainName = disk.domainName
    status.format = disk.spec?.format
    status.store = disk.spec?.storeName
    status.base = disk.spec?.baseName
    status.error = failure.sentence
    status.note =
      disk.id.name == nil
      ? "its attach failed, and the toolstack has given it up" : "its attach failed"
    failures.removeAll { $0.isSameDisk(as: status) }
    failures.append(status)
    if failures.count > Reconciler.mostFailures { failures.removeFirst() }
    saveFailures()
  }

  /// A disk is tried again: what is remembered of its former failure goes.
  func forgetFailures(like disk: Disk) {
    let count = failures.count
    var now = DiskStatus(disk.id, vdev: disk.vdev, state: .starting, since: 0)
    now.domainName = disk.domainName
    failures.removeAll { $0.isSameDisk(as: now) }
    if failures.count != count { saveFailures() }
  }

  /// A named disk that had failed was detached by order: its failure is nothing to see to any more.
  func forgetFailures(of name: DiskName) {
    let count = failures.count
    failures.removeAll { $0.name == name.description }
    if failures.count != count { saveFailures() }
  }

  /// Forgets the failures of a disk or a domain, or all for nil. How many they were.
  func forget(_ target: String?) -> Int {
    let count = failures.count
    failures.removeAll { failure in target.map { failure.isMeant(by: $0) } ?? true }
    if failures.count != count { saveFailures() }
    return count - failures.count
  }

  /// Reads what an earlier daemon has kept.
  func recallFailures() async {
    let path = failuresPath
    do throws(IOError) {
      let text = try await offload.run { () throws(IOError) in try TextFile.read(path) }
      do {
        failures = try ControlLine.decode([DiskStatus].self, Array(text.utf8))
      } catch {
        log.warning("the file of failed attaches makes no sense", metadata: ["file": "\(path)"])
      }
    } catch {
      guard error.code != ENOENT else { return }
      log.warning("cannot read the failed attaches", metadata: ["error": "\(error)"])
    }
  }

  private func saveFailures() {
    let (path, list, log) = (failuresPath, failures, log)
    scheduler.start { [offload] in
      do {
        let text = String(decoding: try ControlLine.encode(list), as: UTF8.self)
        try await offload.run { () throws(IOError) in try TextFile.replace(path, with: text) }
      } catch {
        log.warning("cannot keep the failed attaches", metadata: ["error": "\(error)"])
      }
    }
  }
}

extension DiskStatus {
  /// Whether it is the same disk of the same guest: a guest that is created again has another
  /// domain number.
  func isSameDisk(as other: DiskStatus) -> Bool {
    guard number == other.number, name == other.name else { return false }
    if let name = domainName, let otherName = other.domainName { return name == otherName }
    return domain == other.domain
  }

  /// Whether somebody means this disk: by its domain's number or name, by "5-51712", or by
  /// "5:xvda" or "web:xvda"; a named disk by its name or the path of its device, "/dev/dmu/data".
  package func isMeant(by target: String) -> Bool {
    if let name { return target == name || DiskName(path: target)?.description == name }
    guard let domain, let number, let vdev else { return false }
    var names = ["\(domain)", "\(domain)-\(number)", "\(domain):\(vdev)"]
    if let domainName { names += [domainName, "\(domainName):\(vdev)"] }
    return names.contains(target)
  }
}
