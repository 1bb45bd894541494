// SPDX-License-Identifier: Apache-2.0
// What `xl devd` and a block script do in a driver domain, for the disks of this daemon, where
// neither runs: daemon.driver-domain = "alone".
//
//  1. The backend waits in state 2, and the disk is served: the device is written into its entry.
//  2. The disk has failed: the reason is written there. The toolstack does not see it.
//  3. The backend has closed, and the toolstack wants the disk gone: when nothing of it is held any
//     more its entry is deleted, for which the toolstack waits.
//
// Each is one transaction with a look at what it depends on, and is tried again at the next look.

internal import Logging
internal import XenStore

extension Reconciler {
  /// Whether no script is run for a disk: this daemon does what one would do.
  func isAlone(_ disk: Disk) -> Bool {
    configuration.driverDomain == .alone && disk.sight?.isInDriverDomain == true
  }

  /// Does what a block script would do now, if none is run.
  func actAsScript(for disk: Disk) async {
    guard isAlone(disk), let vbd = disk.id.vbd, let sight = disk.sight else { return }
    do throws(XenStoreError) {
      switch disk.phase {
      case .idle where sight.isClosed, .failed(_, attached: false) where sight.isClosed:
        try await view.delete(vbd)
      case .serving:
        guard let device = disk.device, disk.wanted != nil, sight.device == nil else { return }
        if try await view.connect(vbd, device) {
          log(for: disk).info(
            "the backend has the device", metadata: ["device": "\(device.path)"])
        }
      case .failed(let failure, attached: false):
        if disk.wanted != nil { try await view.refuse(vbd, failure.sentence) }
      default: return
      }
    } catch {
      log(for: disk).warning("cannot write the disk's entry", metadata: ["error": "\(error)"])
      if table[disk.id] != nil { wake(disk, after: .seconds(1)) }
    }
  }
}
