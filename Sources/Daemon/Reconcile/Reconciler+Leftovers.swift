// SPDX-License-Identifier: Apache-2.0
// What is left of disks that are no more: devices, loop devices, workers (and the locks they
// have), pending logs, nodes in xenstore. Nothing of it goes by itself; `dmu-xen doctor --clean`
// removes it piece by piece.

import BlockIO
internal import LinuxBlock
internal import Logging
internal import SystemIO
internal import XenStore

/// Something that is left of a disk.
package struct Leftover: Codable, Sendable, Equatable {
  /// "device /dev/nbd3", "loop-device /dev/loop2", "worker 77", "log KEY",
  /// "source lvm//vg/lv", "nodes 5-51712": names it in `clean`.
  package var name: String
  /// What it is, one line.
  package var what: String
  /// What is lost with it; nil: nothing.
  package var loses: String?
}

extension Reconciler {
  /// Everything that is left.
  func leftovers() async throws(DiskFailure) -> [Leftover] {
    var found: [Leftover] = []
    for (id, device) in await foundDevices() {
      let stray = await examine(id, device)
      found.append(
        Leftover(
          name: "device \(device.path)",
          what: "a device of \(id.words) that no disk has"
            + (stray.hindrance.map { "; \($0)" } ?? ""),
          loses: stray.hindrance))
    }
    for (path, file) in await strayLoops() {
      found.append(
        Leftover(
          name: "loop-device \(path)",
          what: "a loop device of \(file), which a disk has had, that no device stands on"))
    }
    for worker in try await strayWorkers() {
      found.append(
        Leftover(
          name: "worker \(worker.process.pid)",
          what: "a worker of \(worker.disk.words) that serves no disk and has the lock of its store"
        ))
    }
    for kept in try await keptLogs() {
      found.append(
        Leftover(
          name: "log \(kept.entry.key)", what: kept.sentence,
          loses: "\(kept.summary.words), which a guest believes to be written"))
    }
    for record in strayRecords() {
      found.append(
        Leftover(
          name: "source \(record.source)",
          what: "a source that no disk uses, and that its hook does not detach:"
            + " \(sources.table[record.source]?.failure?.sentence ?? "see the log")"))
    }
    do throws(XenStoreError) {
      for vbd in try await view.toldDisks() where table[id(of: vbd)] == nil {
        found.append(
          Leftover(
            name: "nodes \(vbd)",
            what:
              "what the daemon wrote in xenstore at \(vbd.backendPath)/dmu of a disk that it does"
              + " not have"))
      }
    } catch { throw DiskFailure(.daemon, "xenstore cannot be read: \(error): see to it") }
    return found
  }

  /// Removes one of them. Throws `gone` when there is none of that name.
  func clean(_ name: String) async throws(DiskFailure) {
    let words = name.split(separator: " ", maxSplits: 1)
    let subject = words.last.map { String($0) } ?? ""
    switch words.first {
    case "device":
      for (id, device) in await foundDevices() where device.path == subject {
        return await end(StrayDevice(disk: id, node: device, hindrance: nil))
      }
    case "loop-device":
      for (path, _) in await strayLoops() where path == subject {
        try await blocking { () throws(IOError) in try LoopDevice.release(path) }
        return await sweepLoopMarks()
      }
    case "worker":
      let limit = configuration.stopTimeout
      for worker in try await strayWorkers() where String(worker.process.pid) == subject {
        let hasEnded = try await blocking { () throws(IOError) in try worker.end(within: limit) }
        guard hasEnded else { throw .worker("process \(subject) cannot be killed: it hangs") }
        return
      }
    case "source":
      guard let source = Source(subject), strayRecords().contains(where: { $0.source == source })
      else { break }
      if let failure = await detachIfUnused(source) { throw failure }
      guard sources.table[source] == nil else {
        throw DiskFailure(
          .inUse,
          "source \(source) is needed by a disk or by a pending log that is kept: see"
            + " 'dmu-xen status'")
      }
      return
    case "log":
      _ = try await discard(subject)
      return
    case "nodes":
      guard let vbd = VBD(subject), table[id(of: vbd)] == nil else { break }
      do throws(XenStoreError) { return try await view.withdraw(vbd) } catch {
        throw DiskFailure(.daemon, "xenstore cannot be written: \(error): see to it")
      }
    default: break
    }
    throw DiskFailure(.gone, "there is no leftover '\(ForeignText.shown(name))' any more")
  }

  /// Loop devices of files that disks, kept logs or failed attaches name, made as the module's
  /// devices have them (they go with their last close), and that no device stands on: path, file.
  private func strayLoops() async -> [(path: String, file: String)] {
    var files: Set<String> = []
    func add(_ store: String?, _ base: String?) {
      for path in [store, base].compactMap({ $0 }) { files.insert(Images.real(path) ?? path) }
    }
    for disk in table.values where disk.device?.kind != .dm { add(disk.spec?.store, disk.basePath) }
    for failure in failures { add(failure.store, failure.base) }
    do throws(DiskFailure) {
      for kept in try await keptLogs() {
        add(kept.info?.store, kept.info.flatMap { Reconciler.spec($0.params)?.base })
      }
    } catch { log.warning("cannot look for pending logs", metadata: ["error": "\(error)"]) }
    return await offload.run { [files] in
      FileUsers.names(in: "/sys/block").filter { $0.hasPrefix("loop") }.sorted().compactMap {
        name in
        let folder = "/sys/block/\(name)"
        guard let file = FileUsers.line(folder + "/loop/backing_file"), files.contains(file),
          FileUsers.line(folder + "/loop/autoclear") == "1",
          FileUsers.names(in: folder + "/holders").isEmpty
        else { return nil }
        return ("/dev/" + name, file)
      }
    }
  }

  /// Removes the marks of loop devices that are no more (LoopMarks). Another owner of such a
  /// device wants udev to probe it.
  func sweepLoopMarks() async {
    do throws(IOError) {
      let mapper = mapper
      try await offload.run { () throws(IOError) in try mapper.sweepMarks() }
    } catch {
      log.warning(
        "marks of loop devices are left: udev will not probe what gets these devices next",
        metadata: ["error": "\(error)"])
    }
  }

  /// Workers whose links were made for disks of this daemon's run directory, or for devices that
  /// are ours, and that no disk has.
  private func strayWorkers() async throws(DiskFailure) -> [any WorkerAtLarge] {
    let run = configuration.runDirectory
    return try await unknownWorkers().filter { $0.link.hasPrefix(run + "/") }
  }

  /// Workers that no disk has, whatever daemon started them.
  func unknownWorkers() async throws(DiskFailure) -> [any WorkerAtLarge] {
    let known = Set((Array(table.values) + recovering.values).compactMap { $0.worker?.process.pid })
    let processes = host.processes
    let found = try await blocking { () throws(IOError) in try processes.workers() }
    return found.filter { !known.contains($0.process.pid) }
  }
}
