// SPDX-License-Identifier: Apache-2.0
// What the doctor says of named disks that are kept over a reboot.

import Glibc
internal import SystemIO

extension Doctor {
  /// What is wrong with the files in disks.d, and whether they are attached at all; nothing where
  /// there are none.
  func keptDisks() -> [Finding] {
    let files = DiskFiles(configurationPath: configurationPath)
    let what = "the named disks of \(files.folder)"
    var findings: [Finding] = []
    let names: (disks: [DiskName], strange: [String])
    do throws(IOError) { names = try files.names() } catch {
      return [Finding(what, error.description, remedy: "see to it")]
    }
    for path in names.strange {
      findings.append(
        Finding(
          "the file \(path)", "it is named like no disk and is passed over",
          remedy: "rename it: \(DiskName.rule)", .trouble))
    }
    for name in names.disks {
      do throws(ConfigurationError) { _ = try files.load(name) } catch {
        findings.append(
          Finding(
            "the named disk \(name)", "\(error)",
            remedy: "correct it, then run: dmu-xen attach \(name)", .trouble))
      }
    }
    guard !names.disks.isEmpty else { return findings }
    let unit = "dmu-xen-disks.service"
    let wants = root + "/etc/systemd/system/multi-user.target.wants/" + unit
    let isMissing = access(root + "/run/systemd/system", F_OK) == 0 && access(wants, F_OK) != 0
    findings.append(
      Finding(
        "\(what) (\(names.disks.count))",
        isMissing ? "\(unit) is not enabled, so that no boot attaches them" : nil,
        remedy: "systemctl enable \(unit)", .note))
    return findings
  }
}
