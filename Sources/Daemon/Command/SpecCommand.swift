// `dmu-xen spec check`: a spec in plain words, and what is there of it now.

internal import Posix
import Glibc

/// Explains specs.
public enum SpecCommand {
  /// Prints an explanation, or what is wrong.
  public static func check(_ text: String) -> CommandStatus {
    let spec: Spec
    do {
      spec = try Spec(text)
      _ = try FormatOptions(spec)
    } catch {
      CommandOutput.complain("\(error)")
      return .failed
    }
    CommandOutput.say(explain(spec))
    return .done
  }

  /// The explanation, several lines.
  static func explain(_ spec: Spec) -> String {
    var lines = [("spec", spec.description), ("format", spec.format)]
    for option in spec.options {
      let meaning = KnownFormat.named(spec.format)?.options
        .first { $0.name == option.name }?.meaning
      lines.append(
        ("option", "\(option.name) = \(option.value)\(meaning.map { " (\($0))" } ?? "")"))
    }
    lines.append(("store", "\(spec.store) (\(state(spec)))"))
    if spec.format == "raw" {
      lines.append(("base", "none: a raw store has no base"))
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

  private static func state(_ spec: Spec) -> String {
    if Images.exists(spec.store) { return "exists" }
    guard KnownFormat.named(spec.format)?.blockSizes != nil else {
      return "does not exist; stores of this format are not created"
    }
    return spec.base == nil
      ? "does not exist; it would be created if the spec named a base"
      : "does not exist; it will be created"
  }
}

/// The line of a guest's configuration.
enum DiskLine {
  /// For a first disk; `target=` takes the rest of the line as it stands.
  static func text(_ spec: Spec) -> String {
    "disk = [ \"script=block-dmu,vdev=xvda,access=rw,target=\(spec)\" ]"
  }
}

extension Images {
  /// Whether there is anything at a path, as far as one may look.
  static func exists(_ path: String) -> Bool { access(path, F_OK) == 0 }
}
