// SPDX-License-Identifier: Apache-2.0
// `check` of hooks, for `dmu-xen spec check` and the doctor: run by the command itself, with the
// rights of whoever runs it. The daemon is not asked.

import Glibc
internal import SystemIO

/// Asks hooks about sources. All calls block.
struct SourceCheck: Sendable {
  /// A check only looks.
  static let deadline = Duration.seconds(10)

  let folder: HookFolder
  var hooks: any HookRunning = ProcessHooks(asService: false)

  init(configurationPath: String) { folder = HookFolder(configurationPath: configurationPath) }

  /// What the hook of a source says of it, one line; "" if it says nothing. Throws why it cannot
  /// be had.
  func run(_ source: Source) throws(DiskFailure) -> String {
    let program = try folder.program(for: source)
    let outcome: HookOutcome
    do throws(IOError) {
      let work = try SourceCheck.makeFolder()
      defer { rmdir(work) }
      var call = HookCall(
        program: program, arguments: ["check", source.rest], deadline: SourceCheck.deadline,
        files: work + "/check")
      call.environment = ["DMU_SOURCE": "\(source)"]
      outcome = try hooks.run(call)
    } catch {
      throw DiskFailure(.source, "source \(source): \(error.description): see to it")
    }
    guard outcome.isGood else {
      throw .hookFailed(source, program, "check", outcome, SourceCheck.deadline)
    }
    let words = outcome.output.split(whereSeparator: \.isNewline).last.map { String($0) }
    return ForeignText.shown(words ?? "")
  }

  private static func makeFolder() throws(IOError) -> String {
    var template = Array("/tmp/dmu-xen-check-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { throw IOError.last("make a folder in", "/tmp") }
    return String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}

extension Doctor {
  /// Hooks that may not be run, and sources of named disks that cannot be had; nothing where there
  /// are no hooks.
  func sources() -> [Finding] {
    let folder = HookFolder(configurationPath: configurationPath)
    let what = "the hooks in \(folder.path)"
    var findings: [Finding] = []
    do throws(IOError) {
      let schemes = try folder.schemes()
      let (events, refused) = try folder.events()
      var faults = refused
      for scheme in schemes {
        do throws(DiskFailure) { try HookFolder.check(folder.path(scheme), in: folder.path) } catch
        {
          faults.append(error)
        }
      }
      findings += faults.map { Finding("a hook", $0.sentence, remedy: "", .trouble) }
      if faults.isEmpty, !(schemes + events).isEmpty {
        let names = schemes + (events.isEmpty ? [] : ["\(events.count) for events"])
        findings.append(Finding("\(what) (\(names.joined(separator: ", ")))", nil, remedy: ""))
      }
    } catch { findings.append(Finding(what, error.description, remedy: "see to it", .trouble)) }
    return findings + keptSources()
  }

  /// The sources of named disks that are kept over a reboot.
  private func keptSources() -> [Finding] {
    let files = DiskFiles(configurationPath: configurationPath)
    var found: Set<Source> = []
    // What is wrong with the files themselves is told elsewhere.
    do throws(IOError) {
      for name in try files.names().disks {
        do throws(ConfigurationError) {
          if let wish = try files.load(name) {
            found.formUnion(Reconciler.spec(wish.params)?.sources.map(\.source) ?? [])
          }
        } catch { continue }
      }
    } catch { return [] }
    return check(found)
  }

  /// What hooks say of sources.
  func check(_ sources: Set<Source>) -> [Finding] {
    sources.sorted { "\($0)" < "\($1)" }.map { source in
      do throws(DiskFailure) {
        let words = try SourceCheck(configurationPath: configurationPath).run(source)
        let what = "source \(source)" + (words.isEmpty ? "" : " (\(words))")
        return Finding(what, nil, remedy: "")
      } catch { return Finding("source \(source)", error.sentence, remedy: "", .trouble) }
    }
  }
}
