// SPDX-License-Identifier: Apache-2.0
// `dmu-xen spec check`: a spec in plain words, and what is there of it now.

import Glibc
internal import XLConfiguration

/// Explains specs.
package enum SpecCommand {
  /// Prints an explanation, or what is wrong. `configurationPath` says where stores are created.
  package static func check(
    _ text: String, configurationPath: String = Configuration.defaultPath
  ) -> CommandStatus {
    if let explanation = DiskLine.explanation(text) {
      CommandOutput.complain(explanation)
      return .failed
    }
    let spec: Spec
    let options: FormatOptions
    var found: [Source: String] = [:]
    do {
      spec = try Spec(text)
      options = try FormatOptions(spec)
      try examine(spec)
      for (_, source) in spec.sources {
        found[source] = try SourceCheck(configurationPath: configurationPath).run(source)
      }
    } catch {
      CommandOutput.complain("\(error)")
      return .failed
    }
    var createIn = Configuration().createIn
    // A file with errors is for the daemon to tell of.
    do { createIn = try Configuration.load(configurationPath).createIn } catch {
      CommandOutput.complain("\(error): going on with the defaults")
    }
    CommandOutput.say(explain(spec, options, createIn: createIn, found: found))
    return .done
  }

  /// Throws when something is there that can be neither store nor base, or has no place.
  static func examine(_ spec: Spec) throws(DiskFailure) {
    for (role, path) in [("store", spec.store), ("base", spec.base)] {
      guard let path, !Source.isMeant(path) else { continue }
      var status = stat()
      guard stat(path, &status) == 0 else { continue }
      guard [S_IFREG, S_IFBLK].contains(status.st_mode & S_IFMT) else {
        let what = status.st_mode & S_IFMT == S_IFDIR ? "a directory" : "no file"
        throw DiskFailure(
          .io, "\(role) \(path) is \(what): give the path of an image file or a block device")
      }
    }
    guard spec.storeSource != nil || Images.hasFolder(spec.store) else {
      throw .storeDirectoryMissing(spec.store)
    }
  }

  /// The explanation, several lines. `found`: what hooks say of sources.
  static func explain(
    _ spec: Spec, _ options: FormatOptions, createIn: [String], found: [Source: String] = [:]
  ) -> String {
    func words(_ source: Source) -> String {
      "\(source) (its hook \(found[source].flatMap { $0.isEmpty ? nil : "says: " + $0 } ?? "has it"))"
    }
    var lines = [("spec", spec.description), ("format", spec.format)]
    for option in spec.options {
      let meaning = KnownFormat.named(spec.format)?.options
        .first { $0.name == option.name }?.meaning
      lines.append(
        ("option", "\(option.name) = \(option.value)\(meaning.map { " (\($0))" } ?? "")"))
    }
    if let source = spec.storeSource {
      lines.append(("store", words(source)))
    } else {
      lines.append(("store", "\(spec.store) (\(state(spec, options, createIn)))"))
    }
    if spec.format == "raw" {
      lines.append(("base", "none: a raw store has no base"))
    } else if let source = spec.baseSource {
      lines.append(("base", words(source)))
    } else if let base = spec.base {
      lines.append(("base", "\(base) (\(Images.exists(base) ? "exists" : "does not exist"))"))
    } else {
      lines.append(("base", "the one that the store names, if the configuration allows it"))
    }
    lines.append(("disk line", DiskLine.text(spec)))
    return lines.map { name, value in
      name + ":" + String(repeating: " ", count: 11 - name.count) + value + "\n"
    }.joined()
  }

  private static func state(
    _ spec: Spec, _ options: FormatOptions, _ createIn: [String]
  ) -> String {
    var status = stat()
    if stat(spec.store, &status) == 0 {
      let isEmpty = status.st_mode & S_IFMT == S_IFREG && status.st_size == 0
      return isEmpty ? "exists, but has 0 bytes and is no image" : "exists"
    }
    guard KnownFormat.named(spec.format)?.blockSizes != nil else {
      return "does not exist; stores of this format are not created"
    }
    guard spec.base != nil else {
      return "does not exist; it could be created if the spec named a base"
    }
    guard options.create ?? Images.isBelow(spec.store, createIn) else {
      return "does not exist and is not created here: add '?create=yes', or make it with"
        + " '\(DiskFailure.makingCommand(spec))'"
    }
    return "does not exist; it will be created when the domain boots"
  }
}

/// The line of a guest's configuration.
enum DiskLine {
  /// For a first disk; `target=` takes the rest of the line as it stands.
  static func text(_ spec: Spec) -> String {
    "disk = [ \"script=block-dmu,vdev=xvda,access=rw,target=\(spec)\" ]"
  }

  /// What to write instead of a line in positions, SPEC,VDEV,MODE. Today's xl takes the second field
  /// for a format and refuses the line. nil for what is no such line.
  static func explanation(_ text: String) -> String? {
    guard let line = PositionalLine(text), (try? Spec(line.spec)) != nil else { return nil }
    return "this is a disk line of xm, SPEC,VDEV,MODE, which xl refuses, since it takes the second"
      + " field for a format: call dmu-xl instead of xl, or write\ndisk = [ \"\(line.rewritten)\" ]"
  }
}

extension Images {
  /// Whether there is anything at a path, as far as one may look.
  static func exists(_ path: String) -> Bool { access(path, F_OK) == 0 }
}
